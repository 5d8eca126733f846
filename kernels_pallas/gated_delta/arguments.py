"""Arguments that the implementations of `api.chunked` share.

Glossary: S sequences, T tokens, N value heads, K key width, V value width, C channels of q, k and v together,
W conv width, history W - 1 earlier inputs, P snapshots.
"""

from typing import NamedTuple

from jaxtyping import Array, Float, Float32, Int32


class ChunkedArguments(NamedTuple):
    """Arguments of `api.chunked` with the layer's parameters as fields; also the form of their cotangents."""

    qkv: Float[Array, "T C"]
    a: Float[Array, "T N"]
    b: Float[Array, "T N"]
    conv: Float[Array, "C W"]
    a_log: Float[Array, " N"]
    dt_bias: Float[Array, " N"]
    recurrent_state: Float32[Array, "S N V K"]
    conv_state: Float[Array, "S history C"]
    query_starts: Int32[Array, " S"]
    query_lens: Int32[Array, " S"]
    snapshots: Int32[Array, "P 2"]
