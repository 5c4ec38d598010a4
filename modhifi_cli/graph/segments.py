"""Running parts of a network: start from a carried activation, look at module inputs on the way, stop early.

To start behind a cut without knowing the code between the modules, the network's own forward is run with the modules
in front of the cut answering at once: each returns its output for one example, broadcast to the batch, and the cut
returns the carried activation. Whatever happens between modules (flatten, concatenation, class tokens) is then the
network's own. A cut is used only after resuming from it has given the logits of the whole forward.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from modhifi_cli.graph.answers import mapped
from modhifi_cli.graph.heads import adopt_
from modhifi_cli.graph.trace import Trace, trace


class _Stop(Exception):
    """Ends a forward pass once everything that was asked for has been seen."""


Look = Callable[[Tensor], None]


@contextmanager
def inputs_seen(model: nn.Module, looks: Mapping[str, Look]) -> Iterator[None]:
    """Call ``looks[name]`` with the first input of module `name` at each forward; hooks are gone afterwards."""
    handles = []
    try:
        for name, look in looks.items():
            hook = _first_input(look)
            handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def outputs_seen(model: nn.Module, looks: Mapping[str, Look]) -> Iterator[None]:
    """Call ``looks[name]`` with the output of module `name` at each forward; hooks are gone afterwards."""
    handles = []
    try:
        for name, look in looks.items():
            handles.append(model.get_submodule(name).register_forward_hook(_output(look)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _output(look: Look) -> Callable:
    def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        look(output)

    return hook


def _together(runs: Sequence[Tensor]) -> Tensor:
    """Rows of features of several runs of a layer, ``[batch, rows, features]``; ``[rows, features]`` if batches differ.

    Args:
        runs: For each run ``[batch, …, features]``.
    """
    if len({run.shape[0] for run in runs}) == 1:
        return torch.cat([run.reshape(run.shape[0], -1, run.shape[-1]) for run in runs], 1)
    return torch.cat([run.flatten(0, -2) for run in runs])


def _first_input(look: Look) -> Callable:
    def hook(module: nn.Module, inputs: tuple) -> None:
        look(inputs[0])

    return hook


class Segments:
    """The cuts of one network and the runs between them.

    Args:
        model: Network in evaluation mode. It may be edited later: cuts stay valid under structured pruning. Attention
            modules whose projections do not run as modules get a class in which they do (`heads.adopt_`).
        example: A batch of at least two images, ``[batch, channels, height, width]``.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        adopt_(model)
        self.model = model
        self.trace: Trace = trace(model, example)
        self._example = _apart(example[:2])
        # Inside a layer that is sliced itself (timm's BatchNorm with its activation inside), the layer's own narrow
        # tensors would meet the wide answers of what was skipped.
        self._usable: dict[str, bool] = {
            cut: False for cut in self.trace.cuts if any(_is_layer(model, parent) for parent in _ancestors(cut))
        }
        self._skipped = {cut: self._before(cut) for cut in self.trace.cuts}
        self._overwritten: set[tuple[str, str]] = set()
        self._answers = self._record({name for names in self._skipped.values() for name in names})

    @property
    def cuts(self) -> tuple[str, ...]:
        """Names of the cuts that can be resumed from, in execution order; each is tried once."""
        return tuple(cut for cut in self.trace.cuts if self.usable(cut))

    def last_before(self, clock: float, *, behind: float = -1, also: "Segments | None" = None) -> str | None:
        """The last cut that can be resumed from among those that end before a clock; None where there is none.

        Args:
            clock: Of the trace's visits.
            behind: Cuts that end at this clock or before it are passed over.
            also: Segments of another network of the same modules, in which the cut must be usable, too.
        """
        for cut in reversed(self.trace.cuts):
            if behind < self.trace.visits[cut].leave < clock and self.usable(cut) and (also is None or also.usable(cut)):
                return cut
        return None

    def usable(self, cut: str) -> bool:
        """Whether resuming from `cut` gives the logits of the whole forward; tried once, on the network as it is."""
        if cut not in self._usable:
            self._usable[cut] = self._try(cut)
        return self._usable[cut]

    @torch.no_grad()
    def run(
        self,
        inputs: Tensor,
        *,
        start: str | None = None,
        looks: Mapping[str, Look] | None = None,
        outputs: Mapping[str, Look] | None = None,
        until: str | None = None,
        answers: Mapping[str, Tensor] | None = None,
    ) -> Tensor | None:
        """Run one batch from `start` (None: from the images), stopping as soon as nothing more is asked for.

        Args:
            inputs: Images, or the output of the cut `start` for this batch, ``[batch, …]``.
            start: The cut whose output `inputs` is, or None.
            looks: Module name → function called with that module's first input.
            outputs: Module name → function called with that module's output. A layer that runs more than once gives
                all its rows together, at its last run; a convolution a list of its maps, which may differ in size.
            until: The cut whose output is returned, or None where only looks are wanted.
            answers: Module name → its output for this batch, where that is known already: it is not computed again.

        Returns:
            The output of `until`, or None.
        """
        before, behind = dict(looks or {}), dict(outputs or {})
        waiting = {("input", name) for name in before} | {("output", name) for name in behind}
        caught: list[Tensor] = []

        def seen(side: str, name: str, look: Look) -> Look:
            runs: list[Tensor] = []
            calls = self.trace.calls[name][0] if name in self.trace.calls else 1

            def wrapped(tensor: Tensor) -> None:
                if calls > 1:
                    runs.append(tensor.clone())
                    if len(runs) < calls:
                        return
                    tensor = _together(runs) if isinstance(self.model.get_submodule(name), nn.Linear) else runs
                look(tensor)
                waiting.discard((side, name))
                if not waiting and until is None:
                    raise _Stop

            return wrapped

        def catch(module: nn.Module, arguments: tuple, output: Tensor) -> None:
            caught.append(output)
            raise _Stop

        handle = self.model.get_submodule(until).register_forward_hook(catch) if until is not None else None
        try:
            with (
                self._resumed(start, inputs),
                self._answered(start, answers or {}),
                inputs_seen(self.model, {name: seen("input", name, look) for name, look in before.items()}),
                outputs_seen(self.model, {name: seen("output", name, look) for name, look in behind.items()}),
            ):
                self.model(inputs if start is None else self._image(inputs))
        except _Stop:
            pass
        finally:
            if handle is not None:
                handle.remove()
        return caught[0] if caught else None

    def overwritten(self, name: str, *, side: str = "output") -> bool:
        """Whether the network later writes into what a module gives or reads, so that only a copy of it lasts.

        Args:
            name: Of the module.
            side: ``"output"``, or ``"input"``: its first one.
        """
        return (side, name) in self._overwritten

    @torch.no_grad()
    def whole(self, inputs: Tensor, *, start: str | None = None) -> Tensor:
        """The network's output for one batch, from the images or from the cut `start`.

        Args:
            inputs: Images, or the output of the cut `start` for this batch, ``[batch, …]``.
            start: The cut whose output `inputs` is, or None.
        """
        with self._resumed(start, inputs):
            return self.model(inputs if start is None else self._image(inputs))

    def know_usable(self, other: "Segments") -> None:
        """Take over which cuts can be resumed from: `other` is of the same network, and each is tried once for both."""
        self._usable = other._usable

    def _image(self, like: Tensor) -> Tensor:
        """An image batch of the right length for a forward whose stem is skipped: broadcast, so it costs nothing."""
        return self._example[:1].to(like.device).expand(like.shape[0], *self._example.shape[1:])

    def _before(self, cut: str) -> tuple[str, ...]:
        """The outermost modules that have ended before `cut` does and do not hold it."""
        visits = self.trace.visits
        done = [n for n, v in visits.items() if v.leave < visits[cut].leave and not n.startswith(cut + ".")]
        done = [n for n in done if n not in self.trace.calls]  # its answers differ from run to run
        names = set(done)
        return tuple(n for n in done if not any(parent in names for parent in _ancestors(n)))

    @contextmanager
    def _resumed(self, cut: str | None, carried: Tensor) -> Iterator[None]:
        if cut is None:
            yield
            return
        patched: list[nn.Module] = []
        try:
            for name in self._skipped[cut]:
                self._patch(patched, name, _broadcast(self._answers[name], carried))
            self._patch(patched, cut, carried, copied=self.overwritten(cut))
            yield
        finally:
            for module in patched:
                del module.forward

    @contextmanager
    def _answered(self, start: str | None, answers: Mapping[str, Tensor]) -> Iterator[None]:
        behind = -1 if start is None else self.trace.visits[start].leave
        patched: list[nn.Module] = []
        try:
            for name, answer in answers.items():
                if self.trace.visits[name].leave > behind:  # others are in front of the cut, where nothing runs
                    self._patch(patched, name, answer, copied=self.overwritten(name))
            yield
        finally:
            for module in patched:
                del module.forward

    def _patch(self, patched: list[nn.Module], name: str, answer: Any, *, copied: bool = False) -> None:
        # A copy where an in-place operation would write into what is carried, made when it is asked for: a run that
        # stops early never gets to most answers.
        module = self.model.get_submodule(name)
        module.forward = (lambda *_, **__: answer.clone()) if copied else (lambda *_, **__: answer)
        patched.append(module)

    @torch.no_grad()
    def _record(self, names: set[str]) -> dict[str, object]:
        """What modules give for one image; and which tensors are written into behind the module that they came by."""
        answers: dict[str, object] = {}
        seen: list[tuple[str, str, Tensor, int]] = []  # kept until the end, or their versions would go with them

        def note(side: str, name: str, tensor: object) -> None:
            if isinstance(tensor, Tensor) and not tensor.is_inference():
                seen.append((side, name, tensor, tensor._version))
            else:
                self._overwritten.add((side, name))  # nothing is known of it

        def before(name: str) -> Callable:
            return lambda module, inputs: note("input", name, inputs[0] if inputs else None)

        def behind(name: str) -> Callable:
            def hook(module: nn.Module, inputs: tuple, output: object) -> None:
                note("output", name, output)
                if name in names:
                    answers[name] = _detached(output)

            return hook

        handles = []
        try:
            for name in {*names, *self.trace.visits}:
                module = self.model.get_submodule(name)
                handles += [module.register_forward_pre_hook(before(name)), module.register_forward_hook(behind(name))]
            self.model(self._example[:1])
        finally:
            for handle in handles:
                handle.remove()
        changed = {(side, name) for side, name, tensor, version in seen if tensor._version != version}
        self._overwritten |= changed
        return answers

    @torch.no_grad()
    def _try(self, cut: str) -> bool:
        given: list[Any] = []
        with outputs_seen(self.model, {cut: lambda output: given.append(_detached(output))}):
            whole = self.model(self._example)
        if isinstance(whole, Tensor) and not bool(torch.isfinite(whole).all()):
            return False  # nothing can be compared; whoever looks at the activations names the layer that broke them
        try:
            carried = next(iter(given), None)
            if not isinstance(whole, Tensor) or carried is None or carried.shape[0] != whole.shape[0]:
                return False
            logits = self.whole(carried, start=cut)
        except (RuntimeError, TypeError, ValueError, AttributeError):
            # Glue code that cannot live with broadcast answers: this cut is slower to reach, not wrong.
            return False
        return bool(torch.allclose(logits, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max())))


def _apart(example: Tensor) -> Tensor:
    """The same two images, or noise on the second where they are all but equal.

    Of equal images (black ones, say) what was skipped answers the same, so every cut would seem to hold all that is
    behind it, until an edit changes its width.
    """
    first, second = example[0], example[-1]
    if float((first - second).abs().max()) > 1e-2 * max(1.0, float(first.abs().max())):
        return example
    noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(0))
    return torch.stack([first, first + noise.to(first)])


def _ancestors(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _is_layer(model: nn.Module, name: str) -> bool:
    layers = nn.modules.batchnorm._BatchNorm | nn.modules.conv._ConvNd | nn.Linear
    return isinstance(model.get_submodule(name), layers)


def _detached(output: object) -> object:
    return mapped(output, lambda tensor: tensor.detach().clone())


def _broadcast(answer: object, like: Tensor) -> object:
    def wide(tensor: Tensor) -> Tensor:
        tensor = tensor.to(like.device)
        return tensor.expand(like.shape[0], *tensor.shape[1:]) if tensor.dim() and tensor.shape[0] == 1 else tensor

    return mapped(answer, wide)
