"""Inspection of traced programs: their equations, nested ones included."""

import jax


def equations(jaxpr):
    """Yields (equation, name scopes) of a jaxpr and of all jaxprs inside it; scopes of outer equations come
    first.
    """
    yield from _equations(jaxpr.jaxpr if hasattr(jaxpr, "jaxpr") else jaxpr, ())


def _equations(jaxpr, outer):
    for equation in jaxpr.eqns:
        scopes = (*outer, *str(equation.source_info.name_stack).split("/"))
        yield equation, scopes
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner, scopes)
