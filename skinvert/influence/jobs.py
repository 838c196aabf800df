"""What tells one computation of scores from others: the fit, the rows it is of, and what is measured of them."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from ..checkpoint import resumes
from ..identity import Job, Numbers, evenly, identity, joined, numbers_of, parts_of, product, random_row
from ..inverter import HessianInverter
from ..selection import HessianInverterCV
from .fitted import Fitted
from .sides import RowSide, SetSide

__all__ = ["job_of", "with_own_checkpoint"]

# Settings of an inverter that decide its solutions, beside those that its curvature and model show.
DECISIVE = ("autocast", "blocks", "loss", "random_state")


def job_of(
    pairs: Sequence[tuple[Fitted, RowSide | SetSide]], settings: Mapping[str, object], to_the_bit: bool = True
) -> Job:
    """Return the job that is made of each model and what is measured there, by ``settings``.

    ``to_the_bit`` another batch size or another memory makes another one.
    """
    told = [_settled(fitted, side, settings, to_the_bit) for fitted, side in pairs]
    settled = {name: hashlib.sha256(repr([each[name] for each in told]).encode()).hexdigest()[:16] for name in told[0]}
    numbers: dict[str, Numbers] = {}
    for i, (fitted, side) in enumerate(pairs):
        where = "" if len(pairs) == 1 else f", of model {i}"
        numbers |= {f"{name}{where}": values for name, values in _numbers(fitted, side, to_the_bit).items()}
    return Job("job", settled, numbers)


def _settled(
    fitted: Fitted, side: RowSide | SetSide, settings: Mapping[str, object], to_the_bit: bool
) -> dict[str, str]:
    inverter = fitted.inverter
    asked = inverter.hessian_perturbation
    bits = {
        "batch_size": inverter.batch_size,
        "batch_size of test rows": fitted.batch_size,
        "memory": fitted.memory,
    }
    own = {
        # A share of the mean eigenvalue may be found with other last digits.
        "hessian_perturbation": asked if isinstance(asked, str) else inverter.hessian_perturbation_,
        **{name: vars(inverter)[name] for name in DECISIVE},
        "curvature setting": inverter.curvature,
        "measurement": fitted.measurement,
        "test data": side.batches.checksums if to_the_bit else side.batches.row_checksums(),
        **(bits if to_the_bit else {}),
        **settings,
    }
    return identity(inverter.method_, fitted.system, own, to_the_bit)


def _numbers(fitted: Fitted, side: RowSide | SetSide, to_the_bit: bool) -> dict[str, Numbers]:
    """Return a product and the rows' gradients, what the factorisation makes of a row, and what is measured."""
    system, values, inverse = fitted.system, side.values(), fitted.inverter.inverse_
    A, places = system.curvature, parts_of(system)
    code = [_mixed(fitted.training, places)]
    factorised = inverse is not None and not inverse.keeps_operator
    if to_the_bit:
        code.append(product(system))
    elif not factorised:
        # Of all rows: the first batch is another one for another batch size.
        code.append(numbers_of(A.apply(random_row(A)), places))
    found = {
        "code of the model or its loss": joined(code),
        "code of the measurement": joined([numbers_of(values, evenly(len(values))), _mixed(side, places)]),
    }
    if inverse is not None and factorised:
        with warnings.catch_warnings():
            # The solutions that count warn for themselves.
            warnings.simplefilter("ignore")
            found["inverse"] = numbers_of(inverse.apply(random_row(A)))
    return found


def _mixed(side: RowSide | SetSide, places: Sequence[slice]) -> Numbers:
    return numbers_of(side.mixed_gradient(), places)


@contextmanager
def with_own_checkpoint(
    inverter: HessianInverter | HessianInverterCV, folder: str | os.PathLike[str] | None
) -> Iterator[None]:
    """Let a fit of ``inverter`` keep its checkpoint in ``folder``, if that is one, where it can and has none itself.

    A file is left to the scores: it is that of one job alone.
    """
    alone = isinstance(inverter, HessianInverter) and inverter.checkpoint is None and inverter.process_group is None
    if not alone or folder is None or not os.path.isdir(folder) or not resumes(inverter.method):
        yield
        return
    inverter.checkpoint = folder
    try:
        yield
    finally:
        inverter.checkpoint = None
