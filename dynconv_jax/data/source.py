"""What a data set has to say of itself: the interface of all data sources.

A data source is one file that exposes a `DataSource`, by convention `SOURCE`,
and may lie outside the package: `--dataset=package.module:SOURCE`. Its `open`
returns sequences of examples; `prepare.prepare` makes them of anything that
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
    data_dir: where prepared data sets are kept.
    classes: the only classes to keep, numbered in this order; empty: all.
    skip_corrupt: let zero-byte files through, for a reader that skips what it
      cannot decode.
  """

  data_dir: str | os.PathLike[str]
  classes: tuple[str, ...] = ()
  skip_corrupt: bool = False


@dataclasses.dataclass(frozen=True)
class Dataset:
  """An opened data set, all classes and splits.

  Attributes:
    class_names: in label order.
    splits: examples by the name of the split. `split[i]` is a dict of
      image: bytes, a JPEG, PNG or WebP file; label: int; name: str; and, for
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
    name: for messages, and for the folder of what is prepared.
    options: a frozen dataclass. Its fields, made by `option`, become flags, so
      their names start with the source's.
    open: returns the data set, preparing it where need be, from an `options`
      and the options common to all sources.
  """

  name: str
  options: type
  open: Callable[[Any, Common], Dataset]

  def read_options(self, config: Any) -> Any:
    """Returns the options of this source.

    Args:
      config: has an attribute for each option; one that is missing takes its
        default.
    """
    return self.options(
      **{
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(self.options)
        if hasattr(config, field.name)
      }
    )


def option(default: Any, help: str, *, operational: bool = False) -> Any:
  """Returns a field of a source's options, and so a flag.

  Args:
    default: the flag's default.
    help: the flag's help.
    operational: the option says where things lie, not what they are: it may
      change when a run is resumed.
  """
  return dataclasses.field(
    default=default, metadata={'help': help, 'operational': operational}
  )
