"""Networks of the user's own code: any function or class, named ``package.module:name``, that makes an `nn.Module`.

Naming it is what imports the code. The name, its arguments and a hash of its file are kept with the saved network,
which is built again by the same function.
"""

import copy
import hashlib
import importlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modhifi_cli.errors import ConfigError, DataError, first_line, nearest
from modhifi_cli.graph.folded import copied, fold_
from modhifi_cli.graph.inputs import check_images, refuse_finished
from modhifi_cli.models.called import Called, Form, Sent
from modhifi_cli.models.preprocessing import adjusted, named_classes
from modhifi_cli.models.weights import load_weights_, seeded_initialisation
from modhifi_cli.records import LoadedModel, Preprocess

_NEEDED = ("mean", "std", "size")
BUILDER = "modhifi_cli.models.module.build"


def build(
    *,
    factory: str,
    kwargs: Mapping[str, Any] | None = None,
    file: str | None = None,
    sha256: str | None = None,
    example: str | None = None,
    forward: str | None = None,
    allow: str | bool = False,
) -> nn.Module:
    """The network that a saved run's factory makes, in evaluation mode, with whatever weights it gives it.

    Args:
        factory: ``package.module:name``.
        kwargs: Its arguments.
        file: Name of the file that its code was in when the run was made, for messages.
        sha256: Of that file; `changed_code` compares it.
        example, forward: As of `load`; both are code of the module that holds the factory.
        allow: The name of the factory once more, from the one who calls and not from the folder, or True for whatever
            the folder names: importing it runs its code.

    Raises:
        DataError: If its code was not allowed, cannot be imported, or no longer makes a network.
    """
    beside = [name for name in (example, forward) if name and name.partition(":")[0] != factory.partition(":")[0]]
    if allow == factory and beside:
        raise DataError(
            f"the saved network also runs code named {beside[0]}, of another module than the {factory} that was allowed: if "
            "you know that code, say so with load_model(folder, allow=True) or model.trust=true."
        )
    if allow is not True and allow != factory:
        other = f", not {allow}" if allow else ""
        raise DataError(
            f"the saved network is made by code named {factory}{other}, which would run here: if you know that code, "
            f'say so with load_model(folder, allow="{factory}") or model.trust=true.'
        )
    try:
        model = _made(factory, kwargs or {}, exactly(factory))
        fold_(model)
        return _called(model, example, forward)[0]
    except ConfigError as error:
        raise DataError(
            f"the saved network is made by {factory}{f' (it was in {file})' if file else ''}, and that does not work "
            f"here: {error} Start where that module can be imported, or put its folder on PYTHONPATH."
        ) from error


def load(
    *,
    factory: str,
    kwargs: Mapping[str, Any] | None = None,
    weights: str | None = None,
    seed: int = 0,
    preprocess: Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
    name: str | None = None,
    example: str | None = None,
    forward: str | None = None,
) -> LoadedModel:
    """A network of the user's own.

    One parameter for each key of the YAML.

    Args:
        factory: ``package.module:name`` of a function or class that returns an `nn.Module`. It is imported as
            ``python -m`` would: the present folder counts.
        kwargs: Its arguments.
        weights: A file; None keeps the weights that the factory gives; ``"random"`` draws those of every module that
            can reset itself anew.
        seed: Of random weights, and of whatever the factory draws.
        preprocess: How an image becomes its input: ``mean``, ``std`` (one number per channel, 0..1 scale) and ``size``
            (pixels) are needed, ``resize`` and ``interpolation`` are not.
        classes: Names of the classes in the order of the logits, or None.
        name: Short name for tables and folders; None takes the factory's.
        example: ``package.module:name`` of a function without arguments that gives a batch as the data will: a tensor of any
            shape, a tuple, a dictionary. It stands for images and their preprocessing where the network reads anything else.
        forward: ``package.module:name`` of a function of network and batch that gives its answer, ``function(model, batch)``:
            for several inputs, masks, or what of the answer counts. None: the network is called with what is read of a batch.

    Raises:
        ConfigError: If a setting is wrong, or the factory cannot be found, fails or makes no network.
        DataError: If the weights' file cannot be read or does not fit.
        UnsupportedModelError: If the network does not take an image batch or cannot be traced.
    """
    wanted = preprocess_of(preprocess) if example is None or preprocess is not None else None
    make = _found(factory)  # before the seed: what the import itself draws, it draws at the first load only
    with seeded_initialisation(seed):
        model = _made(factory, kwargs or {}, make)
        if weights == "random":
            for module in model.modules():
                if callable(getattr(module, "reset_parameters", None)):
                    module.reset_parameters()
    factory = _defined_as(factory, make)
    code, digest = _code_of(factory)
    account = {None: "weights of the factory", "random": f"random (seed {seed})"}.get(weights)
    account = load_weights_(model, weights) if account is None else account
    account = "; ".join([account, *fold_(model)])
    model, sample = _called(model, example, forward)
    if wanted is None:
        assert sample is not None
        wanted = _read_as_it_is(sample)
    elif sample is None:
        sample = torch.randn((2, len(wanted.mean), *wanted.size), generator=torch.Generator().manual_seed(0))
    parameter = next(model.parameters(), None)
    logits = check_images(model, sample if parameter is None else sample.to(parameter.dtype))
    return LoadedModel(
        model=model,
        name=name or factory.rpartition(":")[2],
        preprocess=wanted,
        architecture=_architecture(factory, kwargs or {}, code, digest, example=example, forward=forward),
        weights=f"{account}, made by {factory} (imported from {code}, sha256 {digest[:12]})",
        classes=named_classes(classes, logits.shape[1]),
    )


def _called(model: nn.Module, example: str | None, forward: str | None) -> tuple[nn.Module, Tensor | None]:
    """The network as one that takes one tensor, and an example of it where there is one; itself where it is such a one."""
    function = None if forward is None else _named(forward, "model.forward")
    if example is None:
        if function is None:
            return model, None
        # Images alone travel as they are, whatever their size.
        return Called(model, Form(torch.zeros(2, 1, 1, 1)), function).eval(), None
    give = _named(example, "model.example")
    try:
        batch = give()
    except Exception as error:  # the user's own code may raise anything
        text = first_line(error, "no message").rstrip(".")
        raise ConfigError(
            f"model.example={example}: it failed with {type(error).__name__}: {text}; it is called without arguments and "
            "returns one batch."
        ) from error
    try:
        if function is None and isinstance(batch, Tensor) and batch.dim() == 4 and batch.is_floating_point():
            return model, _two(batch)
        sent = Sent(model, batch, function).eval()
        return sent, _two(sent.packed(batch)[0])
    except DataError as error:
        raise ConfigError(f"model.example={example}: {str(error).removeprefix('batches: ')}") from error


def _two(samples: Tensor) -> Tensor:
    return samples if len(samples) > 1 else torch.cat([samples, samples])


def _named(name: str, key: str) -> Callable[..., Any]:
    try:
        return exactly(name)
    except ConfigError as error:
        raise ConfigError(str(error).replace("model.factory", key)) from error


def _read_as_it_is(sample: Tensor) -> Preprocess:
    """Of samples that come as the network reads them, ``[batch, channels, height, width]``."""
    channels, height, width = sample.shape[1:]
    return Preprocess((height, width), (0.0,) * channels, (1.0,) * channels)


def described(
    model: nn.Module,
    factory: str,
    kwargs: Mapping[str, Any],
    preprocess: Mapping[str, Any] | None,
    classes: Sequence[str] | None,
    name: str,
) -> LoadedModel:
    """A network at hand that a factory makes.

    Raises:
        ConfigError: If the factory cannot be found, or the preprocessing is not said.
    """
    code, digest = _code_of(factory)
    return LoadedModel(
        model=model,
        name=name,
        preprocess=preprocess_of(preprocess),
        architecture=_architecture(factory, kwargs, code, digest),
        weights=f"weights given in Python, network made by {factory}",
        classes=None if classes is None else tuple(str(one) for one in classes),
    )


def _architecture(
    factory: str, kwargs: Mapping[str, Any], code: Path, digest: str, **named: str | None
) -> dict[str, Any]:
    """What builds the network again; `named` are further functions of the user's, those that there are."""
    made = {"factory": factory, "kwargs": dict(kwargs), "file": code.name, "sha256": digest}
    return {"builder": BUILDER, "kwargs": made | {key: name for key, name in named.items() if name is not None}}


def changed_code(architecture: Mapping[str, Any]) -> str | None:
    """A warning if the code that makes a saved network is no longer what it was, or None.

    Args:
        architecture: A description as `LoadedModel.architecture`; others than this file's are never changed.
    """
    kwargs = architecture.get("kwargs", {})
    if architecture.get("builder") != BUILDER or not kwargs.get("sha256"):
        return None
    try:
        code, digest = _code_of(kwargs["factory"])
    except ConfigError:  # building it will say so
        return None
    if digest == kwargs["sha256"]:
        return None
    return (
        f"the code of {kwargs['factory']} ({code}) has changed since the network was saved (sha256 {digest[:12]}, was "
        f"{kwargs['sha256'][:12]}): the weights fit, but what they compute may be something else."
    )


def exactly(name: str) -> Callable[..., Any]:
    """The function or class ``package.module:name`` that this very module defines.

    Nothing is reached through attributes of other modules: ``some.module:os.system`` names no code of some.module.

    Raises:
        ConfigError: If there is none.
    """
    found = _found(name)
    module, _, path = name.partition(":")
    if getattr(found, "__module__", None) != module or getattr(found, "__qualname__", None) != path:
        where = getattr(found, "__module__", None)
        raise ConfigError(
            f"{name} is not defined in {module}{f' but in {where}' if where else ''}; name code by the module that "
            "defines it."
        )
    return found


def preprocess_of(given: Mapping[str, Any] | None) -> Preprocess:
    """How images become the input of a network of the user's own: ``mean``, ``std`` and ``size`` have to be said.

    Raises:
        ConfigError: If one is missing or out of range.
    """
    missing = [key for key in _NEEDED if key not in (given or {})]
    if missing:
        raise ConfigError(
            f"model.preprocess must say how images become the input of your network, and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing, e.g. model.preprocess={{mean: [0.485, 0.456, 0.406], "
            "std: [0.229, 0.224, 0.225], size: 224}."
        )
    assert given is not None
    mean = given["mean"]
    channels = len(mean) if isinstance(mean, Sequence) and not isinstance(mean, str) else 3
    if channels not in (1, 3):
        raise ConfigError(f"model.preprocess.mean: images have 1 or 3 channels, got {channels} numbers.")
    return adjusted(Preprocess((1, 1), (0.0,) * channels, (1.0,) * channels), given)


def _made(factory: str, kwargs: Mapping[str, Any], make: Callable[..., Any]) -> nn.Module:
    try:
        inspect.signature(make).bind(**kwargs)
    except TypeError as error:
        parameters = inspect.signature(make).parameters
        strange = next((key for key in kwargs if key not in parameters), None)
        hint = f"; {nearest(strange, parameters)}" if strange is not None and parameters else "."
        raise ConfigError(f"model.kwargs: {factory} does not take {dict(kwargs)} ({error}){hint}") from error
    except ValueError:  # a builtin tells no signature; the call will say
        pass
    try:
        model = make(**copy.deepcopy(dict(kwargs)))
    except Exception as error:  # the user's own code may raise anything
        text = first_line(error, "no message").rstrip(".")
        raise ConfigError(
            f"model.factory={factory}: it failed with {type(error).__name__}: {text}; call it in Python with the same "
            "model.kwargs to see where."
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model.factory={factory}: expected a torch.nn.Module, got {type(model).__name__}; name the function that "
            "returns the network."
        )
    refuse_finished(model)
    # A copy: a factory may hand out one and the same module at every call.
    return copied(model).cpu().eval()


def _found(factory: str) -> Callable[..., Any]:
    module, name = _imported(factory)
    found = module
    for part in name.split("."):
        if not hasattr(found, part):
            known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            hint = nearest(name, known) if known else "it holds no function."
            raise ConfigError(f"model.factory={factory}: {module.__name__} has no '{name}', {hint}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(
            f"model.factory={factory}: expected a function or class that makes the network, got a "
            f"{type(found).__name__}."
        )
    return found


def _defined_as(factory: str, make: Callable[..., Any]) -> str:
    """The factory by the module that defines it, where that leads to the same code: so a saved network names it."""
    own = f"{getattr(make, '__module__', '')}:{getattr(make, '__qualname__', '')}"
    try:
        return own if exactly(own) is make else factory
    except ConfigError:
        return factory


def _imported(factory: str) -> tuple[Any, str]:
    name, _, function = str(factory).partition(":")
    if not name or not function:
        raise ConfigError(
            f"model.factory: expected package.module:function with a colon, such as mynets:resnet, got {factory!r}."
        )
    if name.partition(".")[0] in sys.stdlib_module_names:  # a file from elsewhere must not reach them either
        raise ConfigError(f"model.factory={factory}: {name} is part of Python itself and makes no networks.")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does; it stays, since the code may import more when it runs
    try:
        return importlib.import_module(name), function
    except ModuleNotFoundError as error:
        if not (name + ".").startswith(f"{error.name}."):
            raise ConfigError(f"model.factory={factory}: importing {name} failed, {error}; install it.") from error
        raise ConfigError(f"model.factory={factory}: there is no module '{name}', {_near_modules(name)}") from error
    except Exception as error:  # the user's own code may raise anything
        text = first_line(error, "no message").rstrip(".")
        raise ConfigError(
            f"model.factory={factory}: importing {name} failed with {type(error).__name__}: {text}."
        ) from error


def _near_modules(name: str) -> str:
    parent, _, last = name.rpartition(".")
    try:
        places = list(importlib.import_module(parent).__path__) if parent else [os.getcwd()]
    except Exception:  # the parent itself is what is missing
        places = [os.getcwd()]
    known = [module.name for module in pkgutil.iter_modules(places)]
    return nearest(last, known) if known else f"and no other in {places[0]}; start where it can be imported."


def _code_of(factory: str) -> tuple[Path, str]:
    """The file that the factory's module came from, and its sha256."""
    module, _ = _imported(factory)
    path = Path(getattr(module, "__file__", None) or "")
    if not path.is_file():
        raise ConfigError(f"model.factory={factory}: {module.__name__} comes from no file; name a module that does.")
    return path, hashlib.sha256(path.read_bytes()).hexdigest()
