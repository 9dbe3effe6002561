"""Whether the service of this container takes work: `python -m service.healthcheck` ends with 0 or 1."""

import http.client
import ssl
import sys

from service.settings import Settings, read_settings

SECONDS = 4.0
_OWN = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # where a service that listens everywhere finds itself


def is_ready(settings: Settings) -> bool:
    """/readyz says 200 within a few seconds. It is asked without a key, and without a look at its certificate, which
    is not for this machine's own name."""
    host = _OWN.get(settings.host, settings.host)
    if settings.tls_cert is None:
        connection = http.client.HTTPConnection(host, settings.port, timeout=SECONDS)
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection(host, settings.port, timeout=SECONDS, context=context)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(not is_ready(read_settings()))
