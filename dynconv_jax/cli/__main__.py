"""Entry point of `python -m dynconv_jax.cli`, same as `dynconv`."""

from dynconv_jax.cli.command import main

if __name__ == '__main__':
  main()
