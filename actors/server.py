"""HTTP to a vLLM server: time-outs, retries, a bounded number of requests at one time, and errors in one line.

A token stands in the environment only: EGRSD_TEACHER_TOKEN, or EGRSD_TEACHER_TOKEN_BIG for the teacher `big`. It goes into a
header and nowhere else.
"""

from __future__ import annotations

import os
import time
from email.utils import parsedate_to_datetime
from typing import Any

import requests

from pipeline.config import Teacher
from pipeline.errors import EngineError, ModelError, UserError, first_line

TOKEN = "EGRSD_TEACHER_TOKEN"
_BUSY = {408, 425, 429, 500, 502, 503, 504}  # a later request may be answered
_CONNECT_S = 10.0
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 8.0  # between two tries


class Refused(Exception):
    """A server refused a request for what it holds. The message is the server's own."""


class Broken(EngineError):
    """A server answered 500 to every try of one request: the fault may lie in what it was asked."""


class Server:
    """The address of a server and the way to it."""

    def __init__(self, name: str, teacher: Teacher) -> None:
        self.where, self._teacher = f"teachers.{name}, {teacher.server}", teacher
        self._session = requests.Session()
        self._session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=teacher.concurrency))
        self._session.mount("https://", requests.adapters.HTTPAdapter(pool_maxsize=teacher.concurrency))
        token = os.environ.get(f"{TOKEN}_{name.upper()}") or os.environ.get(TOKEN)
        if token:
            self._session.headers["Authorization"] = f"Bearer {token}"

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object at a path. Raises as `post` does."""
        return self._ask("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON object that answers a request.

        Raises Refused with the server's words for a request that it does not take. Raises UserError for a missing or wrong
        token. Raises ModelError for a server or a model that is not there, and EngineError for one that stays down or slow. That
        is Broken where it answered 500 each time.
        """
        return self._ask("POST", path, body)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        teacher, why, wait_s, codes = self._teacher, "", 0.0, set[int]()
        for attempt in range(teacher.tries):
            time.sleep(wait_s)
            wait_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**attempt)
            try:
                url = f"{teacher.server}{path}"
                answer = self._session.request(method, url, json=body, timeout=(_CONNECT_S, teacher.timeout_s))
            except requests.ReadTimeout:
                codes.add(0)
                why = f"gave no answer within {teacher.timeout_s:g} s (timeout_s)"
                continue
            except requests.RequestException as error:
                codes.add(0)
                why = f"cannot be reached ({type(error).__name__})"
                continue
            if answer.status_code not in _BUSY:
                return self._read(answer, path)
            codes.add(answer.status_code)
            why = f"answered {answer.status_code}: {_words(answer)}"
            # No server makes a run wait for longer between two tries than for an answer.
            wait_s = max(wait_s, min(_asked_wait_s(answer), teacher.timeout_s))
        times = f"{teacher.tries} times" if teacher.tries > 1 else "once"
        remedy = "See whether it runs and has room; timeout_s, tries and concurrency say how it is asked. Then resume"
        raise (Broken if codes == {500} else EngineError)(f"the server {why}, asked {times}", self.where, remedy)

    def _read(self, answer: requests.Response, path: str) -> dict[str, Any]:
        if answer.status_code in (401, 403):
            remedy = f"Set {TOKEN} in the environment of every node, and never in a setting"
            raise UserError(f"the server wants another token ({answer.status_code})", self.where, remedy)
        if answer.status_code == 404:
            raise ModelError(f"the server has nothing at {path}: {_words(answer)}", self.where, "Check server and served_model")
        if answer.status_code != 200:
            raise Refused(_words(answer))
        try:
            document = answer.json()
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise ModelError(f"{path} gives no JSON object", self.where, "It must be a vLLM server that speaks the OpenAI API")
        return document


def _asked_wait_s(answer: requests.Response) -> float:
    """Seconds for which a server asks to be left alone (its header Retry-After: seconds or a date); 0 where it does not."""
    asked = answer.headers.get("Retry-After", "")
    try:
        return float(asked) if asked.isdecimal() else parsedate_to_datetime(asked).timestamp() - time.time()
    except ValueError:
        return 0.0


def _words(answer: requests.Response) -> str:
    """What a server says about an error, on one line."""
    try:
        said = answer.json()
        said = said.get("error", said)
        text = str(said.get("message", said) if isinstance(said, dict) else said)
    except (ValueError, AttributeError):
        text = answer.text
    return first_line(ValueError(text))[:300]
