"""What a run does not compute twice: walks, answers that are held, ridges that cannot be best, compilers nobody asked for."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from modhifi_cli.engine import flow
from modhifi_cli.engine.activations import Activations
from modhifi_cli.engine.image_walk import ImageWalk
from modhifi_cli.graph.segments import Segments
from modhifi_cli.graph.surgery import weights_hash
from modhifi_cli.numerics import selection
from modhifi_cli.numerics.allocation import Global
from modhifi_cli.numerics.compensation import Joint
from modhifi_cli.numerics.elimination import elimination
from modhifi_cli.numerics.selection import Greedy
from tests.decoders import FAMILIES, tiny
from tests.engine.test_prune import Images, run, setting
from tests.engine.test_prune_decoder import prune
from tests.graph import networks


def images_through(model, name, work):
    """How many images are computed by a module in the meantime; those of a trial or a trace come in other batches."""
    seen = []

    def hook(module, inputs, output):
        if len(output) == 20 and output.stride(0):  # else one image's answer for all: the module was passed over
            seen.append(len(output))

    handle = model.get_submodule(name).register_forward_hook(hook)
    work()
    handle.remove()
    return sum(seen)


def test_towards_the_dense_network_the_images_go_through_the_first_layer_three_times_however_many_groups_there_are():
    model, images = setting("option_a", count=160)
    settings = {"compensation": Joint(reference="dense"), "allocation": Global(), "batchnorm": "stored", "batch_size": 20}
    first = next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    groups = len(ImageWalk(copy.deepcopy(model), images).parts)
    assert groups > 2
    # Once for the error curves, and after the cuts once in each of the two networks, while layers are solved again.
    assert images_through(model, first, lambda: run(model, images, **settings)) == 3 * 160


def test_the_order_of_removal_that_a_width_was_chosen_by_is_not_found_again(monkeypatch):
    settings = {"compensation": Joint(reference="dense"), "allocation": Global(), "selection": Greedy()}
    found = []

    def counted(consumers, **given):
        found.append(consumers[0].name)
        return elimination(consumers, **given)

    monkeypatch.setattr(selection, "elimination", counted)
    for batchnorm, again in (("stored", False), ("reestimate", True)):
        model, images = setting("option_a", count=160)
        run(model, images, **settings, batchnorm=batchnorm, batch_size=20)
        assert bool(found) is again, "a network with other statistics is another one"


@pytest.mark.parametrize("name", networks.SMALL)
def test_held_answers_and_answers_computed_again_give_the_same_network(name, monkeypatch):
    settings = {"compensation": Joint(reference="dense"), "batchnorm": "stored"}
    model, images = setting(name)
    again = copy.deepcopy(model)
    run(model, images, **settings)
    monkeypatch.setattr(Activations, "hold", lambda self, names, *, item="": iter(()))
    run(again, images, **settings)
    assert weights_hash(again) == weights_hash(model)


def test_no_layer_runs_to_show_a_stream_that_is_carried():
    model, images = networks.cifar_resnet.build(depth=14, widths=(4, 8, 12)).eval(), Images(torch.randn(40, 3, 16, 16))
    standing = Activations(
        model, Segments(model, images.images[:2]), images, batch_size=20, device=torch.device("cpu"), limit_bytes=1e9
    )
    list(standing.advance("layer1.0"))
    streams = []

    def look():
        for read, given, *_ in standing.seen(inputs=["layer1.1.conv2"], outputs=["layer1.1.shortcut"]):
            assert list(read) == ["layer1.1.conv2"]
            streams.append(given["layer1.1.shortcut"])

    assert images_through(model, "layer1.1.conv2", look) == 0
    with torch.no_grad():
        expected = model.layer1[0](torch.relu(model.bn1(model.conv1(images.images))))
    torch.testing.assert_close(torch.cat(streams), expected)


def test_what_is_shown_of_layers_is_not_what_others_made_of_it_in_place():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.Hardtanh(0, 1, inplace=True), nn.Conv2d(4, 2, 1)
    model, images = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval(), Images(torch.randn(6, 3, 12, 12))
    segments = Segments(model, images.images[:2])
    standing = Activations(model, segments, images, batch_size=3, device=torch.device("cpu"), limit_bytes=1e9)
    with torch.no_grad():
        first = layers[0](images.images)
        second = layers[2](first.relu())
    for held in ((), ("0", "2")):
        list(standing.hold(held))
        shown = list(standing.seen(inputs=["2", "4"], outputs=["0", "2"]))
        for name, expected in (("0", first), ("2", second)):
            torch.testing.assert_close(torch.cat([given[name] for _, given, *_ in shown]), expected)
        for name, expected in (("2", first.relu()), ("4", second.clamp(0, 1))):
            torch.testing.assert_close(torch.cat([read[name] for read, *_ in shown]), expected)


def test_no_more_is_held_than_fits():
    model, images = setting("option_a")
    segments = Segments(model, images.images[:2])
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)][:3]
    one = float(segments.run(images.images, until=segments.trace.cuts[0]).numel() * 4)
    standing = Activations(model, segments, images, batch_size=8, device=torch.device("cpu"), limit_bytes=1.5 * one)
    list(standing.hold(convolutions))
    assert list(standing._held) == convolutions[:1]
    for read, given, *_ in standing.seen(inputs=convolutions[1:2], outputs=convolutions):
        assert list(read) == convolutions[1:2] and list(given) == convolutions


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoder_that_keeps_what_its_attention_gave_is_cut_as_one_that_computes_it_again(family, monkeypatch):
    one, other, calls = tiny(family), tiny(family), []
    answering = flow._answering
    monkeypatch.setattr(flow, "_answering", lambda layer, given: calls.append(set(given)) or answering(layer, given))
    prune(one)
    assert any(calls), "something was kept"
    monkeypatch.setattr(flow, "free_memory", lambda: 0.0)
    del calls[:]
    prune(other)
    assert not any(calls), "nothing fits"
    assert weights_hash(one) == weights_hash(other)


def test_a_layer_that_cannot_live_with_kept_answers_is_run_whole(monkeypatch):
    walked, kept = tiny("llama"), tiny("llama")
    prune(walked)
    monkeypatch.setattr(flow, "_giving", lambda found, name: lambda module, inputs, output: found.update({name: 0}))
    prune(kept)
    assert weights_hash(walked) == weights_hash(kept)


def test_groups_are_found_and_operations_counted_without_loading_a_compiler():
    code = (
        "import sys, torch\n"
        "from modhifi_cli.engine.plan import discover\n"
        "from modhifi_cli.graph.counting import count\n"
        "from modhifi_cli.models import cifar_resnet\n"
        "model, images = cifar_resnet.build(depth=8, num_classes=10), torch.randn(2, 3, 16, 16)\n"
        "assert discover(model, images)[1] and count(model, images).macs > 0\n"
        "assert not {'torch._dynamo', 'sympy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_images_are_looked_at_group_by_group_where_batchnorm_is_re_estimated():
    model, images = setting("option_a", count=160)
    settings = {"compensation": Joint(reference="dense"), "allocation": Global(), "batch_size": 20}
    walk = ImageWalk(model, Images(images.images), batchnorm="reestimate")
    first = walk.segments.trace.cuts[0]
    assert images_through(model, first, lambda: run(model, images, batchnorm="reestimate", **settings)) > 3 * 160
