"""Constructors that say what is wrong with the arguments they were given."""

import difflib
import inspect

__all__ = ["CheckedKeywords"]

# What other libraries call the same thing, where the names themselves are too far apart.
_ELSEWHERE = {
    "a": ("op",),
    "alpha": ("lam",),
    "epochs": ("max_epochs",),
    "forward": ("op",),
    "iterations": ("max_evals", "max_epochs"),
    "lmbda": ("lam",),
    "lr": ("learning_rate",),
    "max_iter": ("max_evals", "max_epochs"),
    "matrix": ("A",),
    "n_iter": ("max_evals", "max_epochs"),
    "noise_level": ("noise", "sigma"),
    "operator": ("op",),
    "physics": ("op",),
    "regularization": ("lam",),
    "scorer": ("scoring",),
    "seed": ("random_state",),
    "std": ("sigma",),
    "threads": ("n_jobs",),
}


def _closest(name, known):
    """The parameter that is meant, or None."""
    for other in _ELSEWHERE.get(name.lower().strip("_"), ()):
        if other in known:
            return other
    close = difflib.get_close_matches(name, known, n=1)
    # Abbreviations are no close matches.
    close += [other for other in known if len(name) > 1 and other.startswith(name)]
    return close[0] if close else None


class CheckedKeywords:
    """Mixin, before the classes with a constructor: errors for arguments that it does not take.

    Python's own name the class that wrote ``__init__``, which may be a base that nobody has heard
    of, and nothing that would help. In ``__new__``, so that ``__init__`` keeps the signature in
    which scikit-learn reads the parameters.
    """

    def __new__(cls, *args, **kwargs):
        if args or kwargs:
            cls._check_arguments(args, kwargs)
        return super().__new__(cls)

    @classmethod
    def _check_arguments(cls, args, kwargs):
        params = []
        # (object's own takes anything where there is a __new__, and forgets it.)
        if cls.__init__ is not object.__init__:
            _, *params = inspect.signature(cls.__init__).parameters.values()
        kinds = {param.kind for param in params}
        names = [p.name for p in params if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        takes = f"It takes {', '.join(names) or 'no parameters'}."
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            for name in kwargs:
                if name not in names:
                    meant = _closest(name, names)
                    hint = "" if meant is None else f" Did you mean {meant!r}?"
                    raise TypeError(f"{cls.__name__} has no parameter {name!r}.{hint} {takes}")
        first = [p.name for p in params if p.kind is p.POSITIONAL_OR_KEYWORD]
        if inspect.Parameter.VAR_POSITIONAL not in kinds and len(args) > len(first):
            by_name = [name for name in names if name not in first]
            hint = f" Give the others by name, as in {by_name[0]}=...." if by_name else ""
            raise TypeError(
                f"{cls.__name__} takes {len(first)} by position"
                f"{' (' + ', '.join(first) + ')' if first else ''}, got {len(args)}.{hint} {takes}"
            )
