"""What can go wrong with a request.

    TruthGPTError
    ├── InvalidRequest          the request can never succeed as it stands; `param` names the culprit
    │   ├── PayloadTooLarge     its body is over the limit
    │   └── UnsafeInput         its text is empty, too long or dangerous, and is not cleaned
    ├── Unauthenticated         no credential, or one that is unknown, expired or revoked
    ├── PermissionDenied        the credential may not do this, or this edge does not offer it
    ├── ModelNotFound           no such model is served
    ├── RateLimited             a limit of the caller is used up; try again after `retry_after_s`
    ├── Unavailable             cannot serve now; try again after `retry_after_s`
    │   ├── Overloaded          the model's queue is full
    │   ├── OutOfMemory         the model's device had no memory left for this request
    │   ├── GatewayFull         as many requests as this gateway takes are in flight
    │   ├── Draining            this gateway is stopping
    │   ├── KeysUnavailable     the credential cannot be checked: Redis is away
    │   ├── LimitsUnavailable   the limits cannot be counted: Redis is away
    │   ├── BreakerOpen         the model failed too often and is left alone for a while
    │   └── UpstreamUnavailable the model or Triton is dead, stalled or loading
    ├── DeadlineExceeded        the request's own time is over
    ├── Cancelled               the caller went away
    └── InternalError           a fault of ours; its details are for the log only
        └── UpstreamError       a fault of the model or an answer that makes no sense
            └── EmptyAnswer     the model's answer has no text

No protocol is known here: each edge has one table from these classes to its own codes. `kind` is the stable name in
logs and metrics. What users read is `text`, in English and Spanish; `str(error)` may hold details and is never shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Text:
    """One sentence for people, in the languages that the edges speak."""

    en: str
    es: str

    def of(self, language: str) -> str:
        return self.es if language == "es" else self.en


class TruthGPTError(Exception):
    """Root of the tree. `retryable`: the same request may succeed later, unchanged. `callers_fault`: not the service's.
    `suspect`: it says something about who asks, and is a security event.
    """

    kind: str = "internal"
    retryable: bool = False
    callers_fault: bool = False
    suspect: bool = False
    param: str | None = None
    retry_after_s: float | None = None

    def __init__(self, text: Text, detail: str = "") -> None:
        self.text = text
        super().__init__(detail or text.en)

    def again(self) -> Self:
        """The same error as a new object, for whoever has kept one and raises it later.

        A kept error that is raised itself holds, by its traceback, the frames that it passes with the whole request,
        and what keeps it among them: a cycle, which lives until the rare garbage collection.
        """
        other = type(self).__new__(type(self), *self.args)
        other.__dict__.update(self.__dict__)
        other.__cause__ = self.__cause__
        return other


class InvalidRequest(TruthGPTError):
    kind = "invalid_argument"
    callers_fault = True

    def __init__(self, text: Text, param: str | None = None) -> None:
        super().__init__(text)
        self.param = param


class PayloadTooLarge(InvalidRequest):
    def __init__(self, limit_bytes: int) -> None:
        super().__init__(
            Text(
                f"The request body is larger than {limit_bytes} bytes.",
                f"El cuerpo de la petición supera los {limit_bytes} bytes.",
            )
        )


class UnsafeInput(InvalidRequest):
    """`reasons`: the rules that the text breaks, as sanitize.py names them."""

    kind = "unsafe_input"
    suspect = True

    def __init__(self, text: Text, param: str | None = None, reasons: tuple[str, ...] = ()) -> None:
        super().__init__(text, param)
        self.reasons = reasons


class Unauthenticated(TruthGPTError):
    kind = "unauthenticated"
    callers_fault = suspect = True

    def __init__(self, text: Text | None = None, detail: str = "") -> None:
        super().__init__(
            text
            or Text(
                "A valid API key is needed: send it as Authorization: Bearer KEY or x-api-key.",
                "Se necesita una clave de API válida: envíela como Authorization: Bearer CLAVE o x-api-key.",
            ),
            detail,
        )


class PermissionDenied(TruthGPTError):
    kind = "permission_denied"
    callers_fault = suspect = True

    def __init__(self, text: Text | None = None, detail: str = "") -> None:
        super().__init__(
            text or Text("This API key may not do this.", "Esta clave de API no permite hacer esto."), detail
        )


class RateLimited(TruthGPTError):
    """`window` is the name of the limit that is used up, as domain.Window has it."""

    kind = "rate_limited"
    retryable = callers_fault = suspect = True

    def __init__(self, window: str, limit: int, retry_after_s: float) -> None:
        unit = {
            "minute": ("requests per minute", "peticiones por minuto"),
            "hour": ("requests per hour", "peticiones por hora"),
            "day": ("requests per day", "peticiones por día"),
            "tokens_minute": ("tokens per minute", "tokens por minuto"),
            "tokens_day": ("tokens per day", "tokens por día"),
            "concurrency": ("requests at the same time", "peticiones a la vez"),
        }[window]
        super().__init__(
            Text(
                f"The limit of {limit} {unit[0]} is used up; try again in {retry_after_s:.1f} s.",
                f"Se ha agotado el límite de {limit} {unit[1]}; inténtelo de nuevo en {retry_after_s:.1f} s.",
            )
        )
        self.window, self.limit, self.retry_after_s = window, limit, retry_after_s


class ModelNotFound(TruthGPTError):
    """`version` where it is only this version of the model that is not served."""

    kind = "not_found"
    callers_fault = True
    param = "model"

    def __init__(self, model: str, version: str | None = None) -> None:
        shown = f"'{model[:100]}'" + (f" version {version[:20]}" if version is not None else "")
        super().__init__(Text(f"The model {shown} is not served here.", f"El modelo {shown} no está disponible aquí."))


class Unavailable(TruthGPTError):
    kind = "unavailable"
    retryable = True

    def __init__(self, text: Text | None = None, detail: str = "", retry_after_s: float = 1.0) -> None:
        super().__init__(
            text or Text("The service cannot answer now.", "El servicio no puede responder ahora."), detail
        )
        self.retry_after_s = retry_after_s


class Overloaded(Unavailable):
    kind = "overloaded"

    def __init__(self, detail: str = "", retry_after_s: float = 1.0) -> None:
        super().__init__(
            Text(
                "The model's queue is full. Please try again shortly.",
                "La cola del modelo está llena. Inténtelo de nuevo en unos instantes.",
            ),
            detail,
            retry_after_s,
        )


class OutOfMemory(Unavailable):
    kind = "out_of_memory"

    def __init__(self, detail: str = "", retry_after_s: float = 2.0) -> None:
        super().__init__(
            Text(
                "The model has not enough memory for this request now. Please try again shortly.",
                "El modelo no tiene memoria suficiente para esta petición. Inténtelo de nuevo en unos instantes.",
            ),
            detail,
            retry_after_s,
        )


class GatewayFull(Unavailable):
    def __init__(self, limit: int) -> None:
        super().__init__(
            Text(
                "Too many requests are being answered. Please try again shortly.",
                "Se están atendiendo demasiadas peticiones. Inténtelo de nuevo en unos instantes.",
            ),
            f"{limit} requests are in flight",
        )


class Draining(Unavailable):
    def __init__(self) -> None:
        super().__init__(
            Text(
                "The service is stopping. Please send the request again.",
                "El servicio se está deteniendo. Envíe la petición de nuevo.",
            ),
            "draining",
        )


class KeysUnavailable(Unavailable):
    def __init__(self) -> None:
        super().__init__(
            Text(
                "API keys cannot be checked now. Please try again shortly.",
                "Ahora no se pueden comprobar las claves de API. Inténtelo de nuevo en unos instantes.",
            ),
            "the keys are not known: Redis is away",
            2.0,
        )


class LimitsUnavailable(Unavailable):
    def __init__(self) -> None:
        super().__init__(
            Text(
                "Rate limits cannot be checked now. Please try again shortly.",
                "Ahora no se pueden comprobar los límites de uso. Inténtelo de nuevo en unos instantes.",
            ),
            "the limits cannot be counted: Redis is away, and redis_loss is fail_closed",
            2.0,
        )


class BreakerOpen(Unavailable):
    def __init__(self, model: str, retry_after_s: float) -> None:
        super().__init__(
            Text(
                "The model has failed several times and is being left alone for a moment. Please try again shortly.",
                "El modelo ha fallado varias veces y se le da un respiro. Inténtelo de nuevo en unos instantes.",
            ),
            f"the circuit breaker of {model} is open",
            retry_after_s,
        )


class UpstreamUnavailable(Unavailable):
    """`server`: the connection was refused or lost, or nothing came on it: not this model alone is away."""

    def __init__(self, detail: str = "", retry_after_s: float = 2.0, server: bool = False) -> None:
        super().__init__(
            Text(
                "The model is not available now. Please try again shortly.",
                "El modelo no está disponible ahora. Inténtelo de nuevo en unos instantes.",
            ),
            detail,
            retry_after_s,
        )
        self.server = server


class DeadlineExceeded(TruthGPTError):
    kind = "deadline_exceeded"
    retryable = True

    def __init__(self, detail: str = "") -> None:
        super().__init__(
            Text("The request took too long and was ended.", "La petición tardó demasiado y se dio por terminada."),
            detail,
        )


class Cancelled(TruthGPTError):
    kind = "cancelled"

    def __init__(self, detail: str = "") -> None:
        super().__init__(Text("The request was cancelled.", "La petición se canceló."), detail)


class InternalError(TruthGPTError):
    kind = "internal"

    def __init__(self, detail: str = "") -> None:
        super().__init__(
            Text(
                "An internal error ended this request; the log has its details.",
                "Un error interno terminó esta petición; los detalles están en el registro.",
            ),
            detail,
        )


class UpstreamError(InternalError):
    pass


class EmptyAnswer(UpstreamError):
    def __init__(self) -> None:
        super().__init__("the model's answer has no text")
        self.text = Text("The model's answer is empty.", "La respuesta del modelo está vacía.")


def _tree(root: type[TruthGPTError] = TruthGPTError) -> Iterator[type[TruthGPTError]]:
    yield root
    for child in root.__subclasses__():
        yield from _tree(child)


# By kind, which is what a Record has of its error.
CALLERS_FAULT = frozenset(error.kind for error in _tree() if error.callers_fault)
SUSPECT = frozenset(error.kind for error in _tree() if error.suspect)
