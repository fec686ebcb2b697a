"""The fixtures of conftest.py do what they say."""

import torch


def test_poison_fills_what_torch_leaves_uninitialised(poison):
    assert torch.empty(1000).isnan().all()
    assert torch.empty_like(torch.zeros(7, dtype=torch.bfloat16)).isnan().all()
    assert (torch.empty(1000, dtype=torch.uint8) == 255).all()


def test_poison_does_not_outlive_its_test():
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_seed_is_the_same_for_every_test():
    assert torch.initial_seed() == 0


def test_device_is_the_cpu_or_a_gpu(device):
    assert torch.zeros(1, device=device).device.type == device.type
