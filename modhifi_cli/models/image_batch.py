"""Detection and segmentation networks as networks that take an image batch and answer with one tensor.

Pruning needs a forward that is plain tensor operations on an image batch. A segmentation network gives a dictionary of
maps: its main map is taken. A detection network takes a list of images of any size, resizes them, and chooses boxes by
what it sees: here its parts run once each on what does not depend on the images' content, and its own forward stays
available as ``adapter.network(list_of_images)``, with the same, pruned, modules.
"""

import torch
from torch import Tensor, nn


class SegmentationMap(nn.Module):
    """The main map of a segmentation network.

    Args:
        network: A network of torchvision whose forward gives ``{"out": map, …}``.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[batch, 3, height, width]`` → logits ``[batch, classes, height, width]``."""
        return self.network(images)["out"]


class DetectionParts(nn.Module):
    """The convolutions and linear layers of a detection network, each run once.

    Heads that the network runs on every level of its feature pyramid run on the level of the highest resolution alone,
    and heads on boxes see one box around the whole image. The pyramid's maps are part of the answer, so their channels
    are never pruned; everything in front of them and inside the heads can be.

    Args:
        network: A detection network of torchvision (Faster, Mask and Keypoint R-CNN, RetinaNet, FCOS, SSD).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[batch, 3, height, width]``, normalised → everything that the heads say, ``[batch, numbers]``."""
        network = self.network
        found = network.backbone(images)
        maps = [found] if isinstance(found, Tensor) else list(found.values())
        if not hasattr(network, "rpn"):
            shared = _runs_on_every_level(network.head)
            answers = [*_tensors(network.head(maps[:1] if shared else maps)), *(maps if shared else ())]
        else:
            answers = [*maps, *_tensors(network.rpn.head(maps[:1])), *self._on_boxes(maps[0], images)]
        return torch.cat([answer.reshape(images.shape[0], -1) for answer in answers], 1)

    def _on_boxes(self, maps: Tensor, images: Tensor) -> list[Tensor]:
        from torchvision.ops import roi_align

        heads = self.network.roi_heads
        numbers = torch.arange(images.shape[0], dtype=images.dtype, device=images.device)[:, None]
        height, width = maps.shape[-2:]
        whole = torch.tensor([[0.0, 0.0, float(width), float(height)]], dtype=images.dtype, device=images.device)
        boxes = torch.cat([numbers, whole.expand(images.shape[0], 4)], 1)
        answers = list(heads.box_predictor(heads.box_head(roi_align(maps, boxes, heads.box_roi_pool.output_size))))
        for kind in ("mask", "keypoint"):
            if (head := getattr(heads, f"{kind}_head", None)) is not None:
                pooled = roi_align(maps, boxes, getattr(heads, f"{kind}_roi_pool").output_size)
                answers.append(getattr(heads, f"{kind}_predictor")(head(pooled)))
        return answers


def _runs_on_every_level(head: nn.Module) -> bool:
    """RetinaNet and FCOS share one head among the levels; SSD has a convolution for each."""
    return not any(isinstance(module, nn.ModuleList) for module in head.modules())


def _tensors(answer: object) -> list[Tensor]:
    if isinstance(answer, Tensor):
        return [answer]
    values = answer.values() if isinstance(answer, dict) else answer
    return [tensor for value in values for tensor in _tensors(value)]
