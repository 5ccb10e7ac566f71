"""The command `dynconv count`, from a checkout."""

from dynconv_jax.cli import command

if __name__ == '__main__':
  command.run('count_macs')
