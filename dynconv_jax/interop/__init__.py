"""Import and export of PyTorch weights, with the names used by checkpoints."""

from dynconv_jax.interop.files import (
  read_metadata,
  read_state_dict,
  write_safetensors,
)
from dynconv_jax.interop.mobilenet import (
  check_source,
  source_model,
  source_normalization,
  source_options,
)
from dynconv_jax.interop.pretrained import (
  check_found,
  check_pretrained,
  find_pretrained,
)
from dynconv_jax.interop.state_dict import (
  load_pretrained,
  load_torch_state_dict,
  num_classes,
  to_torch_state_dict,
)
from dynconv_jax.interop.zoo import source_flags

__all__ = [
  'check_found',
  'check_pretrained',
  'check_source',
  'find_pretrained',
  'load_pretrained',
  'load_torch_state_dict',
  'num_classes',
  'read_metadata',
  'read_state_dict',
  'source_flags',
  'source_model',
  'source_normalization',
  'source_options',
  'to_torch_state_dict',
  'write_safetensors',
]
