"""The command `dynconv demo`, from a checkout."""

from dynconv_jax.cli import command

if __name__ == '__main__':
  command.run('demo')
