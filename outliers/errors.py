"""Every error this project raises, as one tree.

    OutliersError
    ├── PermanentError            trying again changes nothing
    │   ├── BadInput              refused before anything ran (exit code 2)
    │   │   ├── UnknownModel          no such model, or it can't be read here
    │   │   ├── UnknownArchitecture   the sites of this family can't be named with certainty
    │   │   ├── CorpusError           unreadable text, or fewer tokens than asked
    │   │   ├── PlanRefused           does not fit the machine, the disk or the price
    │   │   ├── HostRefused           a host whose key is not the known one, or that refuses ours
    │   │   ├── WorkspaceError        the workspace can't be written, or is of a newer format
    │   │   └── TargetError           the artifact store's URL is malformed or not usable
    │   ├── CaptureError          a capture on disk contradicts itself or the study
    │   │   ├── CaptureMismatch       it was begun under other conditions
    │   │   └── CorruptCapture        its bytes are not the bytes that were journaled
    │   ├── SiteError             a forward pass did not give exactly one tensor a site and layer
    │   ├── PublishRefused        the artifact store must not, or will not, take this
    │   │   ├── ForbiddenFile         not on the allow-list by name, content or size
    │   │   ├── DamagedResults        a results folder is not what its manifest says
    │   │   ├── AccessDenied          wrong key, no rights, no such bucket
    │   │   └── DigestConflict        this study is published there with other numbers
    │   ├── ProbeMismatch         a probe's own check failed: its numbers can't be believed
    │   ├── CountMismatch         counting in the pass and counting what was stored give other numbers
    │   ├── SummaryMismatch       two summaries that are not of disjoint parts of one study
    │   ├── DiskFull              the workspace's disk took no more; what is journaled stays
    │   ├── MemoryFull            the memory of the machine or of a GPU took no more; what is journaled stays
    │   ├── Busy                  another process is writing this capture
    │   ├── BudgetSpent           the study would cost more than max_total_price
    │   ├── DeployFailed          the program could not be installed on a machine
    │   └── JobFailed             a step ended with an error that is not one of these
    └── TransientError            the same call may succeed later
        ├── StoreUnavailable      the artifact store did not answer
        ├── HubUnavailable        the model or data set hub did not answer
        ├── JobCancelled          another run ended the job, and this run still needs it
        └── MachineLost           the machine or its job vanished
            └── MachineGone           it did not come back within the longest wait

The retry policy is one isinstance: only `TransientError` is tried again, except MachineGone within the same run, which has
just waited for the machine. *Retry*, or the same command, looks for the machine again.
A message gives the actual value, the limit, and what to do.
"""

from __future__ import annotations

from outliers.untrusted.bounds import MESSAGE_CHARS
from outliers.untrusted.visible import cut, visible, visible_line


class OutliersError(Exception):
    """Base of all errors of this project; str() is one message for a person."""


class PermanentError(OutliersError):
    """Trying again without changing something gives the same error."""


class TransientError(OutliersError):
    """The same call may succeed later."""


class BadInput(PermanentError):
    """The request can't be carried out; nothing was run or spent."""


class UnknownModel(BadInput):
    """The model does not exist, is gated, or can't be read here."""


class UnknownArchitecture(BadInput):
    """The model family is not in the resolver's table."""


class CorpusError(BadInput):
    """The corpus can't be read or is too small."""


class PlanRefused(BadInput):
    """The study does not fit the machine, the disk, the memory or the price."""


class HostRefused(BadInput):
    """A host's key is not the known one, or the host refuses ours."""


class WorkspaceError(BadInput):
    """The workspace can't be used."""


class TargetError(BadInput):
    """The URL of the artifact store can't be used."""


class CaptureError(PermanentError):
    """A capture on disk contradicts itself or the study."""


class CaptureMismatch(CaptureError):
    """The capture on disk was begun under other conditions."""


class CorruptCapture(CaptureError):
    """Bytes on disk are not the bytes that were journaled."""


class SiteError(PermanentError):
    """A forward pass did not give exactly one tensor for each site and layer."""


class PublishRefused(PermanentError):
    """The results can't be published in this form, or not at this target."""


class ForbiddenFile(PublishRefused):
    """A file that may not leave the machine."""


class DamagedResults(PublishRefused):
    """A results folder differs from what was written."""


class AccessDenied(PublishRefused):
    """The artifact store refuses these credentials or this place."""


class DigestConflict(PublishRefused):
    """The study is published there already, with other numbers."""


class ProbeMismatch(PermanentError):
    """A check of a probe failed: the untouched pass is not the captured one, or a change that changes nothing did."""


class CountMismatch(PermanentError):
    """What was counted in the forward pass is not what the stored values of the same sequences give."""


class SummaryMismatch(PermanentError):
    """Two summaries can't be merged."""


class DiskFull(PermanentError):
    """The disk of the workspace takes no more bytes; what is journaled stays."""


class MemoryFull(PermanentError):
    """The memory of the machine, or of a GPU, takes no more bytes; what is journaled stays."""


class Busy(PermanentError):
    """Another process holds the capture."""


class BudgetSpent(PermanentError):
    """The machine would cost more than max_total_price."""


class DeployFailed(PermanentError):
    """The program could not be installed on a machine."""


class JobFailed(PermanentError):
    """A step on a machine ended with an unforeseen error; its log says which."""


class StoreUnavailable(TransientError):
    """The artifact store did not answer."""


class HubUnavailable(TransientError):
    """The model or data set hub did not answer."""


class JobCancelled(TransientError):
    """The job was ended by another run that shared it, or by hand; started again, it continues."""


class MachineLost(TransientError):
    """The machine, or the job on it, vanished."""


class MachineGone(MachineLost):
    """The machine did not answer within the longest wait."""


def _family(root: type[OutliersError]) -> dict[str, type[OutliersError]]:
    names = {root.__name__: root}
    for child in root.__subclasses__():
        names |= _family(child)
    return names


def from_record(kind: str, message: str) -> OutliersError:
    """The error that a job on a machine recorded as (class name, message); an unknown class becomes JobFailed.

    The machine may have been taken over: its text is made visible and is bounded.
    """
    text = visible(cut(message, MESSAGE_CHARS))
    cause = _family(OutliersError).get(kind)
    return cause(text) if cause else JobFailed(f"{visible_line(kind)}: {text}")
