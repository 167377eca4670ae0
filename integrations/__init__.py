"""Adapters to diffusers, accelerate, datasets and evaluate; installed as ``snrweights.integrations``."""

if __name__ != "snrweights.integrations":
    raise ImportError(f"import this folder as snrweights.integrations, not as {__name__!r}")
