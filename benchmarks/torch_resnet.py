"""The former name of `benchmarks.torch_networks`."""

from benchmarks.torch_networks import create as ResNet  # noqa: N812
from benchmarks.torch_networks import use_all_cores as use_all_cores

__all__ = ['ResNet', 'use_all_cores']
