"""What can go wrong with a request.

    TruthGPTError
    ├── InvalidRequest          the request can never succeed as it stands; `param` names the culprit
    │   └── PayloadTooLarge     its body is over the limit
    ├── ModelNotFound           no such model is served
    ├── Overloaded              the model's queue is full; try again after `retry_after_s`
    ├── Unavailable             cannot serve now; try again after `retry_after_s`
    │   ├── GatewayFull         as many requests as this gateway takes are in flight
    │   ├── Draining            this gateway is stopping
    │   └── UpstreamUnavailable the model does not answer: dead, stalled, loading, or Triton is away
    ├── DeadlineExceeded        the request's own time is over
    ├── Cancelled               the caller went away
    └── InternalError           a fault of ours; its details are for the log only
        └── UpstreamError       a fault of the model or an answer that makes no sense

No protocol is known here: each edge has one table from these classes to its own codes. `kind` is the stable name in
logs and metrics. What users read is `text`, in English and Spanish; `str(error)` may hold details and is never shown.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """One sentence for people, in the languages that the edges speak."""

    en: str
    es: str

    def of(self, language: str) -> str:
        return self.es if language == "es" else self.en


class TruthGPTError(Exception):
    """Root of the tree. `retryable`: the same request may succeed later, unchanged."""

    kind: str = "internal"
    retryable: bool = False
    param: str | None = None
    retry_after_s: float | None = None

    def __init__(self, text: Text, detail: str = "") -> None:
        self.text = text
        super().__init__(detail or text.en)


class InvalidRequest(TruthGPTError):
    kind = "invalid_argument"

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


class ModelNotFound(TruthGPTError):
    kind = "not_found"
    param = "model"

    def __init__(self, model: str) -> None:
        shown = model[:100]
        super().__init__(
            Text(f"The model '{shown}' is not served here.", f"El modelo '{shown}' no está disponible aquí.")
        )


class Overloaded(TruthGPTError):
    kind = "resource_exhausted"
    retryable = True

    def __init__(self, detail: str = "", retry_after_s: float = 1.0) -> None:
        super().__init__(
            Text(
                "The model's queue is full. Please try again shortly.",
                "La cola del modelo está llena. Inténtelo de nuevo en unos instantes.",
            ),
            detail,
        )
        self.retry_after_s = retry_after_s


class Unavailable(TruthGPTError):
    kind = "unavailable"
    retryable = True

    def __init__(self, text: Text | None = None, detail: str = "", retry_after_s: float = 1.0) -> None:
        super().__init__(
            text or Text("The service cannot answer now.", "El servicio no puede responder ahora."), detail
        )
        self.retry_after_s = retry_after_s


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


class UpstreamUnavailable(Unavailable):
    def __init__(self, detail: str = "", retry_after_s: float = 2.0) -> None:
        super().__init__(
            Text(
                "The model is not available now. Please try again shortly.",
                "El modelo no está disponible ahora. Inténtelo de nuevo en unos instantes.",
            ),
            detail,
            retry_after_s,
        )


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
