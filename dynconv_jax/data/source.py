"""The interface shared by all data sources.

A data source is one file that exposes a `DataSource`, by convention `SOURCE`.
It may lie outside the package: `--dataset=package.module:SOURCE`. Its `open`
returns sequences of examples. `prepare.prepare` creates them from anything that
can be iterated over once.
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
    classes: the classes to keep, numbered in this order; empty: all.
    skip_corrupt: accept zero-byte files; the reader skips what it cannot
      decode.
  """

  data_dir: str | os.PathLike[str]
  classes: tuple[str, ...] = ()
  skip_corrupt: bool = False


@dataclasses.dataclass(frozen=True)
class Dataset:
  """An opened data set with all its classes and splits.

  Attributes:
    class_names: class names in label order.
    splits: examples by the name of the split. `split[i]` is a dict of
      image: bytes, a JPEG, PNG, or WebP file; label: int; name: str; and, for
      all examples or none, object_mask: bytes, an image file, bright where
      the object is. A split may have an attribute `labels`, int[len(split)];
      otherwise each example is read once for its label. Splits are read from
      several threads, and pickled for worker processes.
    aliases: other names of splits, such as {'test': 'validation'}.
  """

  class_names: tuple[str, ...]
  splits: Mapping[str, Sequence[Mapping[str, Any]]]
  aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class DataSource:
  """A kind of data set, such as CIFAR-10 or any folder of images.

  Attributes:
    name: name in messages and of the folder of prepared data.
    options: a frozen dataclass. Its fields, created by `option`, become flags,
      so their names start with the source's name.
    open: returns the data set, given its options and the common options. It
      prepares the data if needed.
  """

  name: str
  options: type
  open: Callable[[Any, Common], Dataset]

  def read_options(self, config: Any) -> Any:
    """Returns the options of this source.

    Args:
      config: has the options as attributes; missing ones take their default.
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
    operational: the option says where files are, not what they contain. It may
      change when a run resumes.
  """
  return dataclasses.field(
    default=default, metadata={'help': help, 'operational': operational}
  )
