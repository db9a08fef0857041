"""The network's promises to the codec."""

from __future__ import annotations

import dataclasses

import torch

from icmlora.generator.network.stack import stacked
from icmlora.generator.network.tokenizing import tokenize
from tests.icmlora.small_fleet import codec, make_adapter, make_vectors


@torch.no_grad()
def test_condition_and_latent_fit_one_byte_each_whatever_the_vectors_are() -> None:
    net = codec().net
    condition = net.condition({view: 1e6 * vector for view, vector in make_vectors(0).items()})
    latent = net.posterior(stacked([tokenize(make_adapter(0), net.config, net.sensitivity)]), condition[None])
    mean, scale = net.latent_prior(condition)
    assert max(float(part.abs().max()) for part in (condition, latent, mean)) <= 127
    assert float(scale.min()) > 0


@torch.no_grad()
def test_the_posterior_does_not_see_the_signs_of_singular_vectors() -> None:
    net = codec().net
    condition = net.condition(make_vectors(0))
    tokens = tokenize(make_adapter(0), net.config, net.sensitivity)
    turned = tuple(dataclasses.replace(group, inputs=-group.inputs, outputs=-group.outputs) for group in tokens)
    plain, other = (net.posterior(stacked([one]), condition[None]) for one in (tokens, turned))
    assert torch.equal(plain, other)


@torch.no_grad()
def test_vectors_of_one_task_are_nearer_to_each_other_than_to_another_tasks() -> None:
    net = codec().net
    first, second, other = (net.condition(make_vectors(*place)) for place in ((0, 0), (0, 1), (1, 0)))
    assert (first - second).norm() < (first - other).norm()


@torch.no_grad()
def test_a_network_without_vectors_has_one_condition() -> None:
    net = codec(sets=0).net
    assert torch.equal(net.condition({}), net.condition(make_vectors(0)))
