"""Notice the models and schedulers of a script that runs unmodified: patches on diffusers' classes, and their removal.

Nothing is imported ahead of the script: a module is patched right after the script itself has imported it.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import ModuleType
from typing import Any

import torch
from snrweights.integrations.timestep_adapters import adapter_of, refusal_of
from torch import nn

from snrweights.schedulers import as_schedule

_MISSING = object()


def replace_attribute(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute of a class or module; return what restores it as it was."""
    before = vars(owner).get(name, _MISSING)
    setattr(owner, name, value)

    def restore() -> None:
        if before is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

    return restore


def timesteps_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the timesteps among the arguments of ``add_noise(original_samples, noise, timesteps)``.

    Example:
        >>> timesteps_in(("x0", "noise"), {"timesteps": 3})
        3
    """
    return args[2] if len(args) > 2 else kwargs.get("timesteps")


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function with a module as soon as that is imported; at once if it is already."""

    def __init__(self, name: str, callback: Callable[[ModuleType], None]) -> None:
        self.name = name
        self.callback = callback
        self._looking = False
        if name in sys.modules:
            callback(sys.modules[name])
        else:
            sys.meta_path.insert(0, self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the module's own spec, whose loader calls back after it has loaded."""
        if fullname != self.name or self._looking:
            return None
        self._looking = True  # so that the look-up below passes us by
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._looking = False
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                self.remove()
                self.callback(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def remove(self) -> None:
        """Stop waiting."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)


class Schedulers:
    """The noise schedulers that a script has made, and which of them it noises with.

    Attributes:
        timesteps: what the training loop gave to ``add_noise`` last, or None.
    """

    def __init__(self) -> None:
        self.timesteps: Any = None
        self._made: list[weakref.ref[Any]] = []
        self._noising: list[Any] = []

    def made(self, scheduler: Any) -> None:
        """Take note of a scheduler; doing so twice is no error."""
        self._made = [known for known in self._made if known() is not None]
        if all(known() is not scheduler for known in self._made):
            self._made.append(weakref.ref(scheduler))

    def noised(self, scheduler: Any) -> None:
        """Take note that a training loop called ``add_noise`` or the like; pipelines do so without gradients."""
        if torch.is_grad_enabled() and all(known is not scheduler for known in self._noising):
            self._noising.append(scheduler)

    def of_the_loop(self) -> Any:
        """Return the scheduler that training noises with, or if none does the only one there is.

        Raises:
            LookupError: there is none, or there are several that differ.
        """
        alive = [scheduler for known in self._made if (scheduler := known()) is not None]
        candidates = self._noising or [scheduler for scheduler in alive if _readable(scheduler)]
        distinct = [s for i, s in enumerate(candidates) if not any(_alike(s, other) for other in candidates[:i])]
        if len(distinct) == 1:
            return candidates[-1]
        if not distinct:
            raise LookupError(
                f"the script made no noise scheduler that can be read{_named(alive)}; put `snrweights.attach(model, "
                f"schedule, ...)` into it"
            )
        raise LookupError(
            f"the script made several noise schedulers{_named(distinct)}; put `snrweights.attach(model, scheduler, "
            "...)` into it with the right one"
        )


def _named(schedulers: list[Any]) -> str:
    return f": {', '.join(type(scheduler).__name__ for scheduler in schedulers)}" if schedulers else ""


def _readable(scheduler: Any) -> bool:
    try:
        as_schedule(scheduler)
    except TypeError:
        return False
    return True


def _alike(one: Any, other: Any) -> bool:
    """Whether two schedulers are the same one, or of the same class with the same config."""

    def settings(scheduler: Any) -> dict[str, Any]:
        return {key: value for key, value in dict(scheduler.config).items() if not key.startswith("_")}

    return one is other or (type(one) is type(other) and settings(one) == settings(other))


class Noticing:
    """While entered, calls ``on_model(model)`` before the first call with gradients of each outermost diffusers model.

    A model inside another one, a transformer in a UNet say, is not called for: nesting is by structure and not by
    depth of calls, since gradient checkpointing calls the inner one alone.
    """

    def __init__(self, on_model: Callable[[nn.Module], None], on_backward: Callable[[Any], None] | None = None) -> None:
        self.schedulers = Schedulers()
        self._on_model = on_model
        self._on_backward = on_backward
        self._nested: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._walked: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._announced: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._undo = ExitStack()

    def __enter__(self) -> Noticing:
        after = {
            "diffusers.models.modeling_utils": self._patch_models,
            "diffusers.schedulers.scheduling_utils": self._patch_schedulers,
        }
        if self._on_backward is not None:
            after["accelerate.accelerator"] = self._patch_accelerator
        for name, patch in after.items():
            self._undo.callback(AfterImport(name, patch).remove)
        self._patch_compile()
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        self._undo.callback(replace_attribute(owner, name, value))

    def _patch_models(self, module: ModuleType) -> None:
        call, noticing = module.ModelMixin.__call__, self

        def noticed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():  # what is compiled as a whole is seen by _patch_compile
                noticing.called(self)
            return call(self, *args, **kwargs)

        self._replace(module.ModelMixin, "__call__", noticed)

    def _patch_compile(self) -> None:
        """A module that is compiled before its first call is only traced: look into it just before that."""
        compile_, noticing = torch.compile, self

        @functools.wraps(compile_)
        def compile(*args: Any, **kwargs: Any) -> Any:
            compiled = compile_(*args, **kwargs)
            if isinstance(compiled, nn.Module):
                compiled.register_forward_pre_hook(noticing.compiled_called)
            return compiled

        self._replace(torch, "compile", compile)

    def _patch_schedulers(self, module: ModuleType) -> None:
        mixin: Any = module.SchedulerMixin
        schedulers = self.schedulers
        patched: set[type] = set()

        def register_to_config(self: Any, **kwargs: Any) -> None:
            super(mixin, self).register_to_config(**kwargs)  # type: ignore[misc]
            schedulers.made(self)
            if type(self) not in patched:
                patched.add(type(self))
                patch_noising(type(self))

        def patch_noising(cls: type) -> None:
            for name in ("add_noise", "scale_noise", "get_velocity"):
                if hasattr(cls, name):
                    self._replace(cls, name, noticed(getattr(cls, name)))

        def noticed(method: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(method)
            def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
                schedulers.noised(self)
                if method.__name__ == "add_noise" and torch.is_grad_enabled():
                    schedulers.timesteps = timesteps_in(args, kwargs)
                return method(self, *args, **kwargs)

            return wrapper

        self._replace(mixin, "register_to_config", register_to_config)

    def _patch_accelerator(self, module: ModuleType) -> None:
        backward, on_backward = module.Accelerator.backward, self._on_backward

        @functools.wraps(backward)
        def noticed(self: Any, *args: Any, **kwargs: Any) -> Any:
            on_backward(self)  # type: ignore[misc]
            return backward(self, *args, **kwargs)

        self._replace(module.Accelerator, "backward", noticed)

    def called(self, model: nn.Module) -> None:
        """A diffusers model is called, outside of any compiled graph."""
        if model not in self._walked:
            self._walked.add(model)
            if adapter_of(model) is not None or refusal_of(model) is not None:  # else it may only wrap a denoiser
                self._nested.update(inner for inner in _models_in(model) if inner is not model)
        if torch.is_grad_enabled() and model not in self._announced and model not in self._nested:
            self._announced.add(model)
            self._on_model(model)

    def compiled_called(self, compiled: nn.Module, args: tuple[Any, ...]) -> None:
        """A compiled module is called."""
        del args
        for model in _models_in(compiled):
            self.called(model)


def _models_in(module: nn.Module) -> list[nn.Module]:
    """Return the diffusers models in a module, the outer ones first."""
    diffusers_models = sys.modules.get("diffusers.models.modeling_utils")
    if diffusers_models is None:
        return []
    return [inner for inner in module.modules() if isinstance(inner, diffusers_models.ModelMixin)]
