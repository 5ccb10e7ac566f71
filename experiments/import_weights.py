"""The command `dynconv import`, from a checkout."""

from dynconv_jax.cli import command

if __name__ == '__main__':
  command.run('import_weights')
