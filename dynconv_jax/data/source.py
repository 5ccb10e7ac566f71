"""The interface shared by all data sources.

A data source is one file that defines a `DataSource`, by convention `SOURCE`.
Data sources outside the package are named package.module:SOURCE, as in
`--dataset=package.module:SOURCE`. `open` returns sequences of examples.
`prepare.prepare` creates them from any iterable of examples.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Common:
  """Options that all data sources share.

  Attributes:
    data_dir: folder of prepared data sets.
    classes: the classes to keep, in label order; empty for all.
    skip_corrupt: whether to accept zero-byte files. The reader then skips
      images that it cannot decode.
  """

  data_dir: str | os.PathLike[str]
  classes: tuple[str, ...] = ()
  skip_corrupt: bool = False


@dataclasses.dataclass(frozen=True)
class Dataset:
  """An opened data set with all its classes and splits.

  Attributes:
    class_names: class names in label order.
    splits: examples by split name. `split[i]` is a dict of image: bytes, a
      JPEG, PNG, or WebP file; label: int; name: str; and, for all examples or
      none, object_mask: bytes, an image file in which the object is bright. A
      split may have an attribute `labels`, int[len(split)]; otherwise, every
      example is read once for its label. Splits are read from several threads
      and pickled for worker processes.
    aliases: other names of splits, such as {'test': 'validation'}.
  """

  class_names: tuple[str, ...]
  splits: Mapping[str, Sequence[Mapping[str, Any]]]
  aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class DataSource:
  """A kind of data set, such as CIFAR-10 or any folder of images.

  Attributes:
    name: name of the source in messages, and of the folder of prepared data.
    options: a frozen dataclass whose fields, created by `option`, become flags.
      Their names should start with the source's name.
    open: returns the data set, given its options and the common options.
      Prepares the data if needed.
  """

  name: str
  options: type
  open: Callable[[Any, Common], Dataset]

  def read_options(self, config: Any) -> Any:
    """Returns the options of this source.

    Args:
      config: has the options as attributes; missing ones get their default.
    """
    return self.options(
      **{
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(self.options)
        if hasattr(config, field.name)
      }
    )


def option(default: Any, help: str, *, operational: bool = False) -> Any:
  """Returns a field of a source's options, which becomes a flag.

  Args:
    default: the flag's default.
    help: the flag's help.
    operational: whether the option specifies the location of files, not their
      content. It may then change when a run resumes.
  """
  return dataclasses.field(
    default=default, metadata={'help': help, 'operational': operational}
  )
