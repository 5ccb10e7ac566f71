"""python -m dynconv_jax.cli is the command `dynconv`."""

from dynconv_jax.cli.command import main

if __name__ == '__main__':
  main()
