"""Published files of RDN, SAN and HAN: their names, their forward passes as published, what is refused."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from srkd.checkpoint import read_checkpoint
from srkd.errors import SrkdError
from srkd.networks import build_family
from srkd.networks.base import DIV2K_MEAN

Shapes = dict[str, tuple[int, ...]]
State = dict[str, Tensor]
C, BLOCKS, GROUPS, REDUCTION = 16, 2, 3, 4  # of SAN and HAN
G0, D, LAYERS, GROWTH = 6, 2, 3, 4  # of RDN
STAGES = {2: (2,), 3: (3,), 4: (2, 2)}


# Names and shapes, written from the public code, not from our table.
def conv(name: str, c_out: int, c_in: int, kernel: int = 3) -> Shapes:
    return {f"{name}.weight": (c_out, c_in, kernel, kernel), f"{name}.bias": (c_out,)}


def tail(scale: int) -> Shapes:
    shapes: Shapes = {}
    for i, factor in enumerate(STAGES[scale]):
        shapes |= conv(f"tail.0.{2 * i}", C * factor**2, C)
    return shapes | conv("tail.1", 3, C)


def squeeze(name: str, reduction: int) -> Shapes:
    return conv(f"{name}.0", C // reduction, C, 1) | conv(f"{name}.2", C, C // reduction, 1)


def rdn(scale: int) -> Shapes:
    shapes = conv("SFENet1", G0, 3) | conv("SFENet2", G0, G0)
    for d in range(D):
        for c in range(LAYERS):
            shapes |= conv(f"RDBs.{d}.convs.{c}.conv.0", GROWTH, G0 + c * GROWTH)
        shapes |= conv(f"RDBs.{d}.LFF", G0, G0 + LAYERS * GROWTH, 1)
    shapes |= conv("GFF.0", G0, D * G0, 1) | conv("GFF.1", G0, G0)
    for i, factor in enumerate(STAGES[scale]):
        shapes |= conv(f"UPNet.{2 * i}", GROWTH * factor**2, GROWTH if i else G0)
    return shapes | conv(f"UPNet.{2 * len(STAGES[scale])}", 3, GROWTH)


def san(scale: int) -> Shapes:
    shapes = conv("head.0", C, 3) | {"gamma": (1,)} | conv("conv_last", C, C) | tail(scale)
    for name in ("g", "theta", "phi"):
        shapes |= conv(f"non_local.non_local.{name}", C // 8, C, 1)
    shapes |= conv("non_local.non_local.W", C, C // 8, 1) | squeeze("non_local.soca.conv_du", 8)
    for g in range(GROUPS):
        shapes |= {f"RG.{g}.gamma": (1,)} | squeeze(f"RG.{g}.soca.conv_du", REDUCTION)
        for b in range(BLOCKS):
            shapes |= conv(f"RG.{g}.rcab.{b}.conv_first.0", C, C)
            shapes |= conv(f"RG.{g}.rcab.{b}.conv_first.2", C, C)
        shapes |= conv(f"RG.{g}.conv_last", C, C)
    return shapes


def han(scale: int) -> Shapes:
    shapes = conv("head.0", C, 3) | tail(scale)
    for g in range(GROUPS):
        for b in range(BLOCKS):
            block = f"body.{g}.body.{b}.body"
            shapes |= conv(f"{block}.0", C, C) | conv(f"{block}.2", C, C)
            shapes |= squeeze(f"{block}.3.conv_du", REDUCTION)
        shapes |= conv(f"body.{g}.body.{BLOCKS}", C, C)
    shapes |= conv(f"body.{GROUPS}", C, C)
    shapes |= {"csa.gamma": (1,), "csa.conv.weight": (1, 1, 3, 3, 3), "csa.conv.bias": (1,)}
    shapes |= {"la.gamma": (1,)} | conv("last_conv", C, (GROUPS + 1) * C)
    return shapes | conv("last", C, 2 * C)


# The forward passes of the public code, on images in 0..255.
def layer(state: State, name: str, x: Tensor) -> Tensor:
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)


def gate(state: State, name: str, x: Tensor) -> Tensor:
    return layer(state, f"{name}.2", layer(state, f"{name}.0", x).relu()).sigmoid()


def run_tail(state: State, x: Tensor, scale: int) -> Tensor:
    for i, factor in enumerate(STAGES[scale]):
        x = F.pixel_shuffle(layer(state, f"tail.0.{2 * i}", x), factor)
    return layer(state, "tail.1", x)


def run_rdn(state: State, x: Tensor, scale: int) -> Tensor:
    first = layer(state, "SFENet1", x)
    x, outputs = layer(state, "SFENet2", first), []
    for d in range(D):
        y = x
        for c in range(LAYERS):
            y = torch.cat([y, layer(state, f"RDBs.{d}.convs.{c}.conv.0", y).relu()], 1)
        x = layer(state, f"RDBs.{d}.LFF", y) + x
        outputs.append(x)
    x = layer(state, "GFF.1", layer(state, "GFF.0", torch.cat(outputs, 1))) + first
    for i, factor in enumerate(STAGES[scale]):
        x = F.pixel_shuffle(layer(state, f"UPNet.{2 * i}", x), factor)
    return layer(state, f"UPNet.{2 * len(STAGES[scale])}", x)


def soca(state: State, name: str, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    flat, pixels = x.reshape(n, c, h * w), h * w
    centring = torch.eye(pixels) / pixels - torch.full((pixels, pixels), 1 / pixels**2)
    matrix = flat @ centring @ flat.transpose(1, 2)
    three = 3 * torch.eye(c).expand(n, c, c)
    trace = torch.stack([m.trace() for m in matrix])[:, None, None]
    a = matrix / trace
    zy = 0.5 * (three - a)
    y, z = a @ zy, zy
    for _ in range(3):
        zy = 0.5 * (three - z @ y)
        y, z = y @ zy, zy @ z
    root = 0.5 * y @ (three - z @ y) * trace.sqrt()
    return x * gate(state, name, root.mean(1).view(n, c, 1, 1))


def quadrants(state: State, x: Tensor) -> Tensor:
    h, w = x.shape[2] // 2, x.shape[3] // 2
    result = torch.zeros_like(x)
    for rows in (slice(0, h), slice(h, None)):
        for columns in (slice(0, w), slice(w, None)):
            part = x[:, :, rows, columns]
            theta, phi, g = (
                layer(state, f"non_local.non_local.{k}", part).flatten(2)
                for k in ("theta", "phi", "g")
            )
            y = torch.softmax(theta.transpose(1, 2) @ phi, -1) @ g.transpose(1, 2)
            y = y.transpose(1, 2).reshape(part.shape[0], -1, *part.shape[2:])
            result[:, :, rows, columns] = layer(state, "non_local.non_local.W", y) + part
    return result


def run_san(state: State, x: Tensor, scale: int) -> Tensor:
    x = layer(state, "head.0", x)
    y = shared = quadrants(state, x)
    for g in range(GROUPS):
        z = y
        for b in range(BLOCKS):
            block = f"RG.{g}.rcab.{b}.conv_first"
            z = layer(state, f"{block}.2", layer(state, f"{block}.0", z).relu()) + z
        z = layer(state, f"RG.{g}.conv_last", soca(state, f"RG.{g}.soca.conv_du", z))
        y = z + y + state["gamma"] * shared
    return run_tail(state, quadrants(state, y) + x, scale)


def run_han(state: State, x: Tensor, scale: int) -> Tensor:
    head = y = layer(state, "head.0", x)
    newest_first: list[Tensor] = []
    for g in range(GROUPS):
        z = y
        for b in range(BLOCKS):
            block = f"body.{g}.body.{b}.body"
            u = layer(state, f"{block}.2", layer(state, f"{block}.0", z).relu())
            z = u * gate(state, f"{block}.3.conv_du", u.mean((2, 3), keepdim=True)) + z
        y = layer(state, f"body.{g}.body.{BLOCKS}", z) + y
        newest_first.insert(0, y)
    y = layer(state, f"body.{GROUPS}", y)
    maps = torch.stack([y, *newest_first], 1)
    rows = maps.flatten(2)
    energy = rows @ rows.transpose(1, 2)
    attention = torch.softmax(energy.max(-1, keepdim=True)[0].expand_as(energy) - energy, -1)
    out = state["la.gamma"] * (attention @ rows).view(maps.shape) + maps
    two = layer(state, "last_conv", out.flatten(1, 2))
    volume = F.conv3d(y.unsqueeze(1), state["csa.conv.weight"], state["csa.conv.bias"], padding=1)
    one = y * (state["csa.gamma"] * volume.sigmoid().squeeze(1)) + y
    return run_tail(state, layer(state, "last", torch.cat([one, two], 1)) + head, scale)


SHAPES = {"rdn": rdn, "san": san, "han": han}
RUNS = {"rdn": run_rdn, "san": run_san, "han": run_han}
GROUPED = {"channels": C, "blocks": BLOCKS, "group_count": GROUPS, "reduction": REDUCTION}
ARGUMENTS = {
    "rdn": {"channels": G0, "blocks": D, "layers": LAYERS, "growth": GROWTH},
    "san": GROUPED,
    "han": GROUPED,
}


def mean_shift() -> State:
    eye, mean = torch.eye(3).view(3, 3, 1, 1), 255 * torch.tensor(DIV2K_MEAN)
    return {
        "sub_mean.weight": eye,
        "sub_mean.bias": -mean,
        "add_mean.weight": eye,
        "add_mean.bias": mean,
    }


def state_of(family: str, scale: int = 2) -> State:
    torch.manual_seed(0)
    state = {name: 0.1 * torch.randn(shape) for name, shape in SHAPES[family](scale).items()}
    if "gamma" in state:
        # Small similarities, or the softmax would hide what it is made of.
        state["non_local.non_local.theta.weight"] *= 0.01
    return state if family == "rdn" else state | mean_shift()


def write(family: str, folder, scale: int = 2, **extra: Tensor):
    """The file, beside it what RDN's readers must be told."""
    path = folder / f"{family}.pt"
    torch.save({f"module.{k}": v for k, v in (state_of(family, scale) | extra).items()}, path)
    if family == "rdn":
        path.with_suffix(".json").write_text('{"hyper_parameters": {"rgb_range": 255}}')
    return path


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("family", SHAPES)
def test_read_file_gives_the_image_of_the_public_code(family, scale, tmp_path):
    loaded = read_checkpoint(write(family, tmp_path, scale), scale)
    assert loaded.network.arguments == {"scale": scale, "rgb_range": 255.0} | ARGUMENTS[family]
    lr = torch.rand(2, 3, 7, 6)
    mean = torch.tensor(DIV2K_MEAN).view(1, 3, 1, 1) if family != "rdn" else 0.0
    with torch.no_grad():
        expected = RUNS[family](state_of(family, scale), (lr - mean) * 255, scale) / 255 + mean
        torch.testing.assert_close(loaded.network(lr), expected, atol=1e-4, rtol=1e-4)


def test_what_the_public_san_never_calls_is_left_out_and_told(tmp_path):
    loaded = read_checkpoint(write("san", tmp_path), 2)
    # Four of non_local.soca, two of conv_last and a scalar in each group.
    assert loaded.notes[-1] == f"{6 + GROUPS} tensors left out that no layer of the network reads"
    assert not any("left out" in n for n in read_checkpoint(write("han", tmp_path), 2).notes)


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("san", "RG.0.conv_first.weight"),
        ("san", "non_local.soca.conv_du.0.scale"),
        ("han", "conv_last.weight"),
        ("han", "la.conv.weight"),
        ("rdn", "RDBs.0.gamma"),
    ],
)
def test_a_leftover_is_named(family, key, tmp_path):
    path = write(family, tmp_path, **{key: torch.zeros(1)})
    with pytest.raises(SrkdError, match=rf"but 1 of its tensors .*{key}"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("family", "key", "ours"),
    [
        ("san", "RG.2.soca.conv_du.2.bias", "groups.2.attention.excite.bias"),
        ("san", "gamma", "gamma"),
        ("han", "csa.conv.bias", "groups.3.channel_conv.bias"),
        ("rdn", "RDBs.1.convs.2.conv.0.weight", "groups.1.layers.2.weight"),
    ],
)
def test_a_missing_tensor_is_named(family, key, ours, tmp_path):
    state = state_of(family)
    del state[key]
    torch.save(state, tmp_path / "x.pt")
    (tmp_path / "x.json").write_text('{"hyper_parameters": {"rgb_range": 255}}')
    with pytest.raises(SrkdError, match=rf"1 missing \(first: {ours}\)"):
        read_checkpoint(tmp_path / "x.pt")


def test_range_of_rdn_must_be_told(tmp_path):
    path = tmp_path / "rdn.pt"
    torch.save(state_of("rdn"), path)
    with pytest.raises(SrkdError, match=r"does not tell its range.*0\.\.255 or in 0\.\.1\. Write"):
        read_checkpoint(path)
    for said in (1, 255):
        path.with_suffix(".json").write_text(json.dumps({"hyper_parameters": {"rgb_range": said}}))
        loaded = read_checkpoint(path)
        assert loaded.network.config.rgb_range == said
        assert f"internal range 0..{said} (sidecar rdn.json)" in loaded.notes
    path.with_suffix(".json").write_text('{"io": "range 0..1 in and out"}')
    assert read_checkpoint(path).network.config.rgb_range == 1
    path.with_suffix(".json").write_text(
        '{"hyper_parameters": {"rgb_range": 1, "mean_shift": true}}'
    )
    with pytest.raises(SrkdError, match=r"mean_shift True .* but rdn networks have False"):
        read_checkpoint(path)


def test_files_with_marks_of_several_networks_are_the_more_special_one(tmp_path):
    # A HAN file is an RCAN file and more, so its layout comes before RCAN's; without the more it is RCAN.
    extra = ("la.", "csa.", "last")
    rcan = {k: v for k, v in state_of("han").items() if not k.startswith(extra)}
    torch.save(rcan, tmp_path / "rcan.pt")
    assert read_checkpoint(tmp_path / "rcan.pt").info["family"] == "rcan"
    assert read_checkpoint(write("han", tmp_path)).info["family"] == "han"


@pytest.mark.parametrize("family", SHAPES)
def test_bare_weights_of_ours(family, tmp_path):
    network = build_family(family, {"scale": 3, **ARGUMENTS[family]})
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    loaded = read_checkpoint(tmp_path / "weights.safetensors")
    assert loaded.notes[0].startswith("layout srkd")
    assert loaded.network.config == network.config
    found = loaded.network.state_dict()
    assert all(torch.equal(v, found[k]) for k, v in network.state_dict().items())
