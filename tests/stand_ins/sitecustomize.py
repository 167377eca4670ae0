"""Hides the stand-in from packages that look for torchvision before they use more of it than there is."""

import importlib.util

_find_spec = importlib.util.find_spec


def find_spec(name, package=None):
    return None if name == "torchvision" else _find_spec(name, package)


importlib.util.find_spec = find_spec
