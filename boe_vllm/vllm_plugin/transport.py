"""What a request goes through between the API server and the engine, tried at admission.

The engine decodes every request in its input thread, which checks the types of all fields and
repeats the checks of `SamplingParams.__post_init__`. An error there ends the thread, and with it
every later request, while the server says that it is healthy. So whatever the engine will do to a
request is done here first.
"""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest

_FAILURES = (ValueError, TypeError, OverflowError, RecursionError, VLLMValidationError)
_PATH = re.compile(r"`\$(?:\[(\d+)\])?(?:\.(\w+))?")  # of what cannot be decoded
_NAME = re.compile(r"""unknown field (['"])(.*?)\1|'?(\w+)""")


def check_transport(sent: SamplingParams | EngineCoreRequest) -> None:
    """Encode and decode a request, or its params, as on the way to the engine.

    Of a request with `n` above 1 the engine gets copies, whose seeds count up; the last one is
    tried too.

    Raises:
        VLLMValidationError: naming the field.
    """
    # Imported late: it looks for a GPU.
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    params = sent if isinstance(sent, SamplingParams) else sent.sampling_params
    if params is not None and params.n > 1:
        last = copy.copy(params)
        last.n, last.seed = 1, (params.seed or 0) + params.n - 1
        check_transport(last)
    try:
        encoded = MsgpackEncoder().encode(sent)
    except _FAILURES as error:
        name = _unsendable(sent)
        raise VLLMValidationError(
            f"{name}: expected a value that can be sent to the engine, got one that cannot "
            f"({error}); correct it",
            parameter=name,
        ) from error
    try:
        MsgpackDecoder(type(sent)).decode(encoded)
    except _FAILURES as error:
        refused: str | None = None
        if found := _PATH.search(str(error)):
            refused = found[2] or type(sent).__struct_fields__[int(found[1] or 0)]
        raise refusal(error, refused) from error


def _unsendable(sent: SamplingParams | EngineCoreRequest) -> str:
    """The field that cannot be encoded."""
    from vllm.v1.serial_utils import MsgpackEncoder

    for name in sent.__struct_fields__:
        value = getattr(sent, name)
        try:
            MsgpackEncoder().encode(value)
        except _FAILURES:
            return _unsendable(value) if isinstance(value, SamplingParams) else name
    return "request"


def refusal(error: Exception, name: str | None = None) -> VLLMValidationError:
    """The error that the HTTP server answers with status 400, naming the field.

    Args:
        error: what is wrong.
        name: of the field; None if the message begins with it.
    """
    if isinstance(error, VLLMValidationError) and error.parameter is not None:
        return error
    text = str(error)
    if name is None and (found := _NAME.match(text)):
        name = found[2] or found[3] or "vllm_xargs"
    return VLLMValidationError(text, parameter=name)
