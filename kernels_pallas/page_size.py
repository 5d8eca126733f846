"""The size of a page of keys and values; a module without imports, for code that must not import jax."""

PAGE = 64  # tokens; equal to a chunk of the gated delta rule, so that a prefix is whole pages and whole chunks
