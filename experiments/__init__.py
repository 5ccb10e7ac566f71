"""Programs, from a checkout: those of dynconv_jax.cli, and their flag files."""

from dynconv_jax import cli

# python -m experiments.train runs dynconv_jax/cli/train.py.
__path__ = [*__path__, *cli.__path__]
