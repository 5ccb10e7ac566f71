"""The command `dynconv export zoo`, from a checkout."""

from dynconv_jax.cli import command

if __name__ == '__main__':
  command.run('export_zoo')
