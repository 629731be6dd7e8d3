"""The zoo: which names exist, and how to build them. Importing this loads no torch.

To add a network: its file, its test, one line in FAMILIES and its names in ZOO.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from srkd.errors import SrkdError, nearest

if TYPE_CHECKING:
    from srkd.networks.base import Network

# family -> (network class, config class)
FAMILIES: dict[str, tuple[str, str]] = {
    "edsr": ("srkd.networks.edsr:Edsr", "srkd.networks.edsr:EdsrConfig"),
    "rcan": ("srkd.networks.rcan:Rcan", "srkd.networks.rcan:RcanConfig"),
    "swinir": ("srkd.networks.swinir:SwinIR", "srkd.networks.swinir:SwinIRConfig"),
    "rdn": ("srkd.networks.rdn:Rdn", "srkd.networks.rdn:RdnConfig"),
    "san": ("srkd.networks.san:San", "srkd.networks.san:SanConfig"),
    "han": ("srkd.networks.han:Han", "srkd.networks.han:HanConfig"),
    "bsrn": ("srkd.networks.bsrn:Bsrn", "srkd.networks.bsrn:BsrnConfig"),
    "rlfn": ("srkd.networks.rlfn:Rlfn", "srkd.networks.rlfn:RlfnConfig"),
    "smfanet": ("srkd.networks.smfanet:Smfanet", "srkd.networks.smfanet:SmfanetConfig"),
}


@dataclass(frozen=True)
class ZooEntry:
    family: str
    about: str
    arguments: dict[str, Any] = field(default_factory=dict)
    scales: tuple[int, ...] = (2, 3, 4)


def _edsr(about: str, channels: int, blocks: int, residual_scale: float) -> ZooEntry:
    sizes = {"channels": channels, "blocks": blocks, "residual_scale": residual_scale}
    return ZooEntry("edsr", about, sizes)


def _mlperf(about: str, channels: int) -> ZooEntry:
    sizes = {"channels": channels, "blocks": 5, "mean_shift": False, "tail": "one_step"}
    return ZooEntry("edsr", about, sizes, scales=(2,))


def _rcan(about: str, channels: int, blocks: int, group_count: int) -> ZooEntry:
    sizes = {"channels": channels, "blocks": blocks, "group_count": group_count}
    return ZooEntry("rcan", about, sizes)


def _swinir(about: str, channels: int, depths: int, tail: str) -> ZooEntry:
    sizes = {"channels": channels, "depths": (6,) * depths, "tail": tail}
    return ZooEntry("swinir", about, sizes)


def _rdn(about: str, channels: int, blocks: int, layers: int, growth: int) -> ZooEntry:
    sizes = {"channels": channels, "blocks": blocks, "layers": layers, "growth": growth}
    return ZooEntry("rdn", about, sizes)


def _attended(
    family: str, about: str, channels: int, blocks: int, group_count: int, reduction: int
) -> ZooEntry:
    """SAN and HAN, which have sizes of the same names."""
    sizes = {"channels": channels, "blocks": blocks}
    return ZooEntry(family, about, {**sizes, "group_count": group_count, "reduction": reduction})


def _rlfn(about: str, channels: int, mid_channels: int, blocks: int) -> ZooEntry:
    sizes = {"channels": channels, "mid_channels": mid_channels, "blocks": blocks}
    return ZooEntry("rlfn", about, sizes)


ZOO: dict[str, ZooEntry] = {
    "edsr": _edsr("EDSR, 256 channels, 32 blocks", 256, 32, 0.1),
    "edsr_baseline": _edsr("EDSR, 64 channels, 16 blocks", 64, 16, 1.0),
    "edsr_c64b32": _edsr("EDSR student of DUKD, MiPKD and CSD", 64, 32, 0.1),
    "edsr_c16b32": _edsr("EDSR student of DUKD's ablation", 16, 32, 0.1),
    "edsr_tiny": _edsr("EDSR student of MKD, 16 channels, 4 blocks", 16, 4, 1.0),
    "edsr_mlperf_f64b5": _mlperf("MLPerf Mobile EDSR, 64 channels, 5 blocks, x2", 64),
    "edsr_mlperf_f32b5": _mlperf("MLPerf Mobile EDSR, 32 channels, 5 blocks, x2", 32),
    "rcan": _rcan("RCAN, 64 channels, 10 groups of 20 blocks", 64, 20, 10),
    "rcan_lightweight": _rcan("RCAN student, 10 groups of 6 blocks", 64, 6, 10),
    "rcan_c32b6g10": _rcan("RCAN teacher of MiPKD's ablation", 32, 6, 10),
    "rcan_c32b5g5": _rcan("RCAN student of MiPKD's ablation", 32, 5, 5),
    "rcan_a": _rcan("RCAN-A of MKD, 16 channels, 4 groups of 1", 16, 1, 4),
    "rcan_b": _rcan("RCAN-B of MKD, 16 channels, 4 groups of 4", 16, 4, 4),
    "rcan_c": _rcan("RCAN-C of MKD, 32 channels, 4 groups of 4", 32, 4, 4),
    "swinir": _swinir("SwinIR-M, 180 channels, 6 RSTBs, classical tail", 180, 6, "classical"),
    "swinir_lightweight": _swinir(
        "SwinIR-S, 60 channels, 4 RSTBs, one-step tail", 60, 4, "one_step"
    ),
    "swinir_c60": _swinir("SwinIR student of DUKD and MiPKD, classical tail", 60, 4, "classical"),
    "rdn": _rdn("RDN, configuration B: 16 blocks of 8 layers, growth 64", 64, 16, 8, 64),
    "rdn_tiny": _rdn("RDN student of MKD, 4 blocks of 4 layers, growth 16", 16, 4, 4, 16),
    "san": _attended("san", "SAN, 64 channels, 20 groups of 10 blocks", 64, 10, 20, 16),
    "san_tiny": _attended("san", "SAN student of MKD, 16 channels, 4 groups of 1", 16, 1, 4, 4),
    "han": _attended("han", "HAN, 64 channels, 10 groups of 20 blocks", 64, 20, 10, 16),
    "han_tiny": _attended("han", "HAN student of MKD, 16 channels, 4 groups of 4", 16, 4, 4, 4),
    "bsrn": ZooEntry("bsrn", "BSRN, 64 channels, 8 blocks", {"channels": 64, "blocks": 8}),
    "rlfn": _rlfn("RLFN, 52 channels, 6 blocks", 52, 52, 6),
    "rlfn_ntire": _rlfn("RLFN of NTIRE 2022, 46 channels, 4 blocks", 46, 48, 4),
    "smfanet": ZooEntry("smfanet", "SMFANet, 36 channels, 8 blocks", {"channels": 36, "blocks": 8}),
    "smfanet_plus": ZooEntry(
        "smfanet", "SMFANet+, 48 channels, 12 blocks", {"channels": 48, "blocks": 12}
    ),
}


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def build_family(family: str, arguments: dict[str, Any]) -> Network:
    """Build a network from what model.json stores. Unknown families and arguments are refused."""
    if family not in FAMILIES:
        raise SrkdError(f"unknown network family '{family}'; {nearest(family, list(FAMILIES))}")
    network_path, config_path = FAMILIES[family]
    config_class = _load(config_path)
    known = [f.name for f in fields(config_class)]
    for key in arguments:
        if key not in known:
            raise SrkdError(f"network family '{family}' takes no '{key}'; {nearest(key, known)}")
    # JSON and TOML have lists, configs are hashable.
    plain = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    return cast("Network", _load(network_path)(config_class(**plain)))


def zoo_entry(name: str) -> ZooEntry:
    """The table entry of a name; unknown names are refused with the nearest valid one."""
    if name not in ZOO:
        raise SrkdError(f"unknown network '{name}'; {nearest(name, list(ZOO))}")
    return ZOO[name]


def build(name: str, scale: int) -> Network:
    """Build a network of the zoo with fresh weights."""
    entry = zoo_entry(name)
    if scale not in entry.scales:
        raise SrkdError(
            f"network '{name}' exists at x{', x'.join(map(str, entry.scales))}, not x{scale}; "
            "choose one of those with --scale."
        )
    return build_family(entry.family, {**entry.arguments, "scale": scale})


def zoo_name(family: str, arguments: dict[str, Any]) -> str | None:
    """The zoo's name for a network, None when it is none of the zoo's configurations."""
    config_class = _load(FAMILIES[family][1])
    wanted = config_class(**arguments)
    for name, entry in ZOO.items():
        same_scale = {**entry.arguments, "scale": wanted.scale}
        if entry.family == family and config_class(**same_scale) == wanted:
            return name
    return None
