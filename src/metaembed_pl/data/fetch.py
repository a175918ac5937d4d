"""Download pictures that items give by address: only on request, within limits."""

import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException

from metaembed_pl.errors import UserError

SCHEMES = ("http://", "https://")
CHUNK_BYTES = 2**16
AGENT = "metaembed-pl"


@dataclass(frozen=True)
class Fetch:
    """How pictures are fetched.

    Args:
        timeout_s: per picture, from the request to its last byte.
        max_bytes: per picture.
        attempts: if the server is busy or the connection breaks.
    """

    timeout_s: float = 10.0
    max_bytes: int = 20_000_000
    attempts: int = 2

    def __call__(self, url: str) -> bytes:
        """The encoded picture at an address.

        Raises:
            UserError: the address is not http(s), or the picture is missing, too large or too slow.
        """
        if not url.startswith(SCHEMES):
            raise UserError(f"{url}: pictures are only fetched from http:// and https://")
        for attempt in range(self.attempts):
            try:
                return self._content(url)
            except UserError:
                raise
            except urllib.error.HTTPError as error:
                reason = f"the server returned {error.code} {error.reason}"
                if error.code < 500 and error.code != 429:
                    break
            except (OSError, HTTPException, ValueError) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            if attempt + 1 < self.attempts:
                time.sleep(min(1.0, self.timeout_s))
        raise UserError(f"{url} cannot be fetched: {reason}")

    def _content(self, url: str) -> bytes:
        ends = time.monotonic() + self.timeout_s
        request = urllib.request.Request(url, headers={"User-Agent": AGENT})
        # A redirect may lead to http, https or ftp, never to a file: urllib ensures that.
        with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
            parts, size = [], 0
            while chunk := answer.read1(CHUNK_BYTES):
                size += len(chunk)
                if size > self.max_bytes:
                    raise UserError(f"{url} has more than {self.max_bytes:,} bytes: not downloaded")
                if time.monotonic() > ends:
                    raise TimeoutError(f"timed out after {self.timeout_s:g} s")
                parts.append(chunk)
        return b"".join(parts)
