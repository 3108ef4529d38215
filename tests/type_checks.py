"""beartype, which checks types in tests, with its checks made once for each signature.

jaxtyping's import hook decorates nested functions too, each time that they are defined: a fifth of
the time to trace a model went into checks that had been made before. pyproject.toml names `checked`
as the type checker of the hook. What jaxtyping has decorated is never the function itself but one
without a body, which has its signature.
"""

import beartype

_decorated = {}


def checked(fn):
    """`beartype.beartype(fn)` of a function without a body, shared by all of its signature."""
    named = fn.__kwdefaults__ or {}
    defaults = *(fn.__defaults__ or ()), *named.values()
    signature = (
        fn.__module__, fn.__qualname__, fn.__code__, *fn.__annotations__.items(), *named,
        *map(type, defaults), *defaults,
    )  # fmt: skip
    try:
        known = _decorated.get(signature)
    except TypeError:  # an annotation or a default has no hash
        return beartype.beartype(fn)
    if known is None:
        known = _decorated[signature] = beartype.beartype(fn)
    return known
