"""The bilevel step of meta distillation: a knowledge network that learns what helps its student.

Paper: Zhu, Chen, Liu, "Learning Knowledge Representation with Meta Knowledge Distillation for Single Image
Super-Resolution", arXiv 2207.08356. No public code; the order of the updates follows alinlab/L2T-ww.

    theta_t = theta_{t-1} - alpha grad_theta L_kd(theta_{t-1}, phi)         t = 1 .. T           (2)
    phi    <- phi - beta grad_phi L_org(theta_T),  L_org = |S_{theta_T}(x) - y|_1                (3)

    theta  student's parameters, and those of the method that `BilevelPlan.inner` names
    phi    the method's others      alpha  learning rate of the iteration
                                    beta   `BilevelPlan.meta_learning_rate`

One iteration: (1) the steps (2) on a copy of theta that is thrown away, and (3) with an Adam of its own; (2) T Adam
steps of theta on L_kd; (3) one step of theta on L_org, which is the loop's ordinary step with the loop's
optimiser. Several processes average the gradients of (3) and of the real steps; the virtual steps (2) are
each process's own. Each of the three optimisers has its own moments: those of L_kd, whose gradients are of another
size, would swallow the steps on L_org, and would move the tail, which L_kd does not reach.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

import srkd.ranks as ranks

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from srkd.networks.base import Network

# Adam's usual 1e-8 is as large as the gradient in (3), which is alpha times one of the usual size.
META_EPSILON = 1e-12


@dataclass(frozen=True)
class BilevelPlan:
    """How a method's bilevel step runs.

    inner_steps     T, of the real and of the virtual steps on L_kd
    meta            whether phi learns from L_org, through (3); otherwise it learns with theta, from L_kd
    meta_every      iterations from one update of phi through (3) to the next
    inner           the method's parameters, by name, that belong to theta and learn from L_kd with the student
    task_step       whether one more virtual step, on L_org, follows those on L_kd before (3)
    """

    inner_steps: int
    meta: bool
    meta_every: int
    meta_learning_rate: float
    inner: tuple[str, ...] = ()
    task_step: bool = False


class BilevelMethod(Protocol):
    """A method with a distance between features that its own parameters take part in."""

    @property
    def student_taps(self) -> tuple[str, ...]: ...

    def distance(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        """L_kd of the features at the taps; a function of its arguments and the parameters alone."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


def split(
    method: BilevelMethod, plan: BilevelPlan
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """The method's parameters by name: those of theta, and phi."""
    phi = dict(method.named_parameters())
    return {name: phi.pop(name) for name in plan.inner}, phi


class BilevelState:
    """The optimisers of a run with bilevel steps besides the loop's own, and the last L_org(theta_T)."""

    def __init__(
        self, kd: torch.optim.Adam, meta: torch.optim.Adam | None, reconstruction: Tensor
    ) -> None:
        self.kd, self.meta, self.reconstruction = kd, meta, reconstruction

    @classmethod
    def of(
        cls,
        student: Network,
        method: BilevelMethod,
        plan: BilevelPlan,
        learning_rate: float,
        betas: tuple[float, float],
    ) -> BilevelState:
        """Fresh optimisers; `learning_rate` and `betas` are those of the student's steps."""
        inner, outer = split(method, plan)
        theta, phi = [*student.parameters(), *inner.values()], list(outer.values())
        trained = theta if plan.meta else [*theta, *phi]
        kd = torch.optim.Adam(trained, lr=learning_rate, betas=betas, fused=True)
        meta = None
        if plan.meta:
            meta = torch.optim.Adam(phi, lr=plan.meta_learning_rate, eps=META_EPSILON, fused=True)
        return cls(kd, meta, torch.zeros((), device=theta[0].device))

    def state_dict(self) -> dict[str, Any]:
        return {
            "kd": self.kd.state_dict(),
            "meta": self.meta.state_dict() if self.meta is not None else None,
            "reconstruction": self.reconstruction,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.kd.load_state_dict(state["kd"])
        if self.meta is not None:
            self.meta.load_state_dict(state["meta"])
        self.reconstruction = state["reconstruction"].to(self.reconstruction.device)


def bilevel_iteration(
    student: Network,
    method: BilevelMethod,
    plan: BilevelPlan,
    state: BilevelState,
    lr: Tensor,
    hr: Tensor,
    taught: Mapping[str, Tensor],
    *,
    iteration: int,
    learning_rate: float,
    bf16: bool = False,
) -> dict[str, Tensor]:
    """All of one iteration but its step on L_org. Changes theta and phi, and leaves no gradients on them.

    lr, hr      (N, 3, h, w) and (N, 3, scale*h, scale*w) in [0, 1]
    taught      the teacher's features of `lr` at the method's taps, without graph
    iteration   0-based; every `plan.meta_every`-th begins with the meta part
    bf16        whether the student's real steps run under autocast; the meta part never does

    Returns scalars for the log, the same names at every iteration: kd is L_kd before the first real step;
    meta, if phi learns from L_org, the newest L_org(theta_T).
    """
    if state.meta is not None and iteration % plan.meta_every == 0:
        gradients, state.reconstruction = meta_gradient(
            student, method, plan, lr, hr, taught, learning_rate
        )
        ranks.average_([*gradients, state.reconstruction])
        _, phi = split(method, plan)
        for p, gradient in zip(phi.values(), gradients, strict=True):
            p.grad = gradient
        state.meta.step()
        state.meta.zero_grad(set_to_none=True)

    for group in state.kd.param_groups:
        group["lr"] = learning_rate
    state.kd.zero_grad(set_to_none=True)  # of what the loop's own step left
    before = [
        knowledge_step(student, method, state, lr, taught, bf16) for _ in range(plan.inner_steps)
    ]
    terms = {"kd": before[0]}
    return terms if state.meta is None else {**terms, "meta": state.reconstruction}


def knowledge_step(
    student: Network,
    method: BilevelMethod,
    state: BilevelState,
    lr: Tensor,
    taught: Mapping[str, Tensor],
    bf16: bool,
) -> Tensor:
    """One Adam step on L_kd; returns L_kd before it."""
    with torch.autocast(lr.device.type, torch.bfloat16, enabled=bf16):
        features = student.features(lr, method.student_taps)
    distance = method.distance(features, taught)
    trained = [p for group in state.kd.param_groups for p in group["params"]]
    distance.backward(inputs=trained)
    ranks.average_gradients(trained)
    state.kd.step()
    state.kd.zero_grad(set_to_none=True)
    return distance.detach()


class _Losses(nn.Module):
    """L_kd and L_org as forward passes, which is what `functional_call` runs."""

    def __init__(self, student: Network, method: BilevelMethod) -> None:
        super().__init__()
        self.student, self.method = student, method

    def forward(self, lr: Tensor, target: Tensor | Mapping[str, Tensor]) -> Tensor:
        """L_org of an HR image, L_kd of a teacher's features."""
        if isinstance(target, Tensor):
            return (self.student(lr) - target).abs().mean()
        features = self.student.features(lr, self.method.student_taps)
        return self.method.distance(features, target)


def meta_gradient(
    student: Network,
    method: BilevelMethod,
    plan: BilevelPlan,
    lr: Tensor,
    hr: Tensor,
    taught: Mapping[str, Tensor],
    alpha: float,
) -> tuple[list[Tensor], Tensor]:  # Eq. (2), and the gradient in (3)
    """Exact grad_phi L_org(theta_T), a tensor for each parameter of phi, and L_org(theta_T).

    The parameters, gradients and buffers of student and method stay as they are. No autocast: gradients of
    gradients. The graph of all steps is kept: replaying the steps one by one takes a third less memory and
    a third more time.
    """
    losses = _Losses(student, method)
    inner, phi = split(method, plan)
    theta = {
        **{f"student.{name}": p for name, p in student.named_parameters()},
        **{f"method.{name}": p for name, p in inner.items()},
    }
    theta = {name: p.detach().requires_grad_() for name, p in theta.items()}
    # Statistics that a layer may keep would move with every virtual step.
    buffers = {f"student.{name}": b.clone() for name, b in student.named_buffers()}
    targets: list[Tensor | Mapping[str, Tensor]] = [taught] * plan.inner_steps
    if plan.task_step:
        targets.append(hr)
    with torch.autocast(lr.device.type, enabled=False):
        for target in targets:
            loss = functional_call(losses, {**theta, **buffers}, (lr, target))
            # What the loss does not reach, as L_kd the tail, has no gradient and stays.
            slopes = torch.autograd.grad(
                loss, list(theta.values()), create_graph=True, allow_unused=True
            )
            theta = {
                name: value if slope is None else value - alpha * slope
                for (name, value), slope in zip(theta.items(), slopes, strict=True)
            }
        reconstruction = functional_call(losses, {**theta, **buffers}, (lr, hr))
        gradients = torch.autograd.grad(
            reconstruction, list(phi.values()), allow_unused=True, materialize_grads=True
        )
    return list(gradients), reconstruction.detach()
