"""Serve a study that `build.py` made and gather its votes in one file.

    python examples/human_eval/collect.py study --votes study_votes.jsonl

Annotators open the address that is printed. It is open to this machine only, unless `--host 0.0.0.0`: there is no
password and no encryption, so only in a network you trust, or behind a proxy that has both: give the proxy's name by
`--public_name`. Each vote is on the disk before the page hears that it arrived. A vote that comes twice is written
once: pages repeat what was not confirmed.
"""

import argparse
import ipaddress
import json
import os
import re
import signal
import socket
import sys
import threading
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(EXAMPLES))  # mistakes.py: examples/ is folders of scripts, not a package

from mistakes import run_script

try:
    import fcntl
except ImportError:  # Windows has none: there nobody is kept from a second collector
    fcntl = None

MAX_BODY = 1 << 20  # bytes: a thousand pairs' votes are half of it
MAX_ANNOTATORS = 100  # bounds the file, since each of them votes once on each pair
CHOICES = ("left", "right", "indistinguishable")
ONCE = ("Host", "Origin", "Content-Length", "Content-Type", "Range")  # headers that are read, so one of each
KINDS = {"practice": "practice", "main": "pairs", "repeat": "pairs"}  # of a vote -> where the study lists the pair
TYPES = {"study": str, "page": int, "annotator": str, "pair": str, "kind": str, "position": int, "left": str,
         "right": str, "choice": str, "reasons": list, "seconds_to_unlock": float, "seconds_to_vote": float,
         "replays": int, "time": str, "viewport": str, "synthetic": bool}  # fmt: skip


def parse_args(input_args=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", type=Path, help="the study")
    add("--votes", type=Path, required=True, help="JSON lines to append to; outside the study's folder")
    add(
        "--annotators",
        nargs="+",
        metavar="ID",
        help=f"the only ids that may vote (default: the first {MAX_ANNOTATORS})",
    )
    add("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine only)")
    add("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    add("--public_name", nargs="+", default=[], metavar="NAME", help="names by which pages reach a proxy before this")
    return parser.parse_args(input_args)


def read_study(folder: Path) -> dict:
    """The study's data out of its page."""
    page = folder / "index.html"
    found = page.is_file() and re.search(r'id="study">(.*?)</script>', page.read_text(encoding="utf-8"))
    if not found:
        raise SystemExit(f"{page} is not a page that build.py made")
    return json.loads(found[1])


def vote_id(vote: dict) -> tuple[str, str, str]:
    """What a vote is on: the same annotator, pair and kind (main, repeat, practice) has one vote."""
    return vote["annotator"], vote["kind"], vote["pair"]


def check_vote(vote, study: dict) -> None:
    """Raises `ValueError` with what is wrong with a vote on `study`."""
    if not isinstance(vote, dict) or set(vote) != set(TYPES):
        raise ValueError("a vote has other keys")
    for key, kind in TYPES.items():
        if type(vote[key]) is not kind and not (kind is float and type(vote[key]) is int):
            raise ValueError(f"{key} must be {kind.__name__}")
    if vote["study"] != study["study"]:
        raise ValueError("this vote belongs to another study")
    if not re.fullmatch(r"[a-z0-9_-]{1,32}", vote["annotator"]):
        raise ValueError("annotator: 1 to 32 of a-z, 0-9, - and _")
    pairs = {pair["pair"]: pair for pair in study[KINDS[vote["kind"]]]} if vote["kind"] in KINDS else {}
    if vote["pair"] not in pairs:
        raise ValueError("no such pair")
    if sorted((vote["left"], vote["right"])) != sorted(pairs[vote["pair"]]["clips"]):
        raise ValueError("left and right are not the clips of this pair")
    if vote["choice"] not in CHOICES:
        raise ValueError(f"choice must be one of {', '.join(CHOICES)}")
    if len(vote["reasons"]) > len(study["reasons"]) or any(
        reason not in study["reasons"] for reason in vote["reasons"]
    ):
        raise ValueError("unknown reason")
    numbers = [vote[key] for key in ("page", "position", "replays", "seconds_to_unlock", "seconds_to_vote")]
    if not all(0 <= number < 1e9 for number in numbers):
        raise ValueError("a number is out of range")
    if len(vote["time"]) > 40 or len(vote["viewport"]) > 20:
        raise ValueError("time or viewport is too long")


def host_name(netloc: str) -> str:
    """The name or address in `host:port`, in small letters. Raises `ValueError` for what is none."""
    parts = urlsplit(f"//{netloc}")
    if parts.netloc != netloc or "@" in netloc or not parts.hostname:
        raise ValueError("not a host")
    _ = parts.port  # which is checked only when it is read
    return parts.hostname


def is_own_name(name: str, public_names: list[str]) -> bool:
    """Whether this machine, or a proxy before it, is called by `name`.

    A page of another site can have its own name lead here (DNS rebinding), and would then be served and heard as if
    it were ours. It cannot do so by an address, and not by names that are not its own.
    """
    own = socket.gethostname().lower()
    with suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    return name in {"localhost", own, f"{own}.local", *map(str.lower, public_names)}


class VoteFile:
    """JSON lines that only grow; each vote once, on the disk when `append` returns.

    Raises `SystemExit` while another collector has the file: each would write what the other one has as well.
    """

    def __init__(self, path: Path):
        self.lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("ab+")
        if fcntl is not None:
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # dropped by the system when this process ends
            except OSError:
                self.file.close()
                raise SystemExit(f"--votes {path}: another collect.py is writing to it; stop that first") from None
        self.file.seek(0)
        lines = self.file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):  # cut off by a crash: not confirmed, so the page sends it again
            self.file.write(b"\n")
        self.known = {}  # what identifies a vote -> the choice
        for line in lines:
            try:
                vote = json.loads(line)
                self.known.setdefault(vote_id(vote), vote["choice"])
            except (ValueError, KeyError, TypeError, RecursionError):
                print(f"{path}: a line that is no vote is left as it is: {line[:60]!r}")

    def append(self, votes: list[dict]) -> int:
        """Write the votes that are new, and return how many those are."""
        with self.lock:
            fresh = {}
            for vote in votes:
                if self.known.get(vote_id(vote), vote["choice"]) != vote["choice"]:
                    raise ValueError(f"{vote['annotator']} voted otherwise on this pair before: two people, one name?")
                if vote_id(vote) not in self.known:
                    fresh.setdefault(vote_id(vote), vote)
            if len({who for who, *_ in [*self.known, *fresh]}) > MAX_ANNOTATORS:
                raise ValueError(f"there are {MAX_ANNOTATORS} annotators already")
            if fresh:
                self.file.write("".join(json.dumps(vote) + "\n" for vote in fresh.values()).encode())
                self.file.flush()
                os.fsync(self.file.fileno())
                self.known |= {who: vote["choice"] for who, vote in fresh.items()}
        return len(fresh)


class Handler(BaseHTTPRequestHandler):
    """The page, the clips that it names, and `votes`; nothing else of the disk can be asked for."""

    timeout = 30  # seconds that a client may be silent

    def __init__(
        self,
        *args,
        study: dict,
        folder: Path,
        votes: VoteFile,
        annotators: list[str] | None,
        public_names: list[str] = (),
    ):
        self.study = study
        self.votes = votes
        self.annotators = annotators
        self.public_names = public_names
        clips = [clip for pair in study["practice"] + study["pairs"] for clip in pair["clips"]]
        self.files = {f"/clips/{clip}.mp4": folder / "clips" / f"{clip}.mp4" for clip in clips}
        self.files |= {"/": folder / "index.html", "/index.html": folder / "index.html"}
        super().__init__(*args)

    def log_message(self, *args):
        """One line a request would bury the votes."""

    def parse_request(self) -> bool:
        """Read the request's head, and answer what is malformed, or comes from elsewhere, at once."""
        if not super().parse_request():
            return False
        self.close_connection = True
        status, problem = self.find_problem()
        if problem:
            self.answer(status, problem.encode())
        return not problem

    def find_problem(self) -> tuple[HTTPStatus, str]:
        """What is wrong with the headers, and the status to answer with; "" if nothing is."""
        if self.headers.defects:
            return HTTPStatus.BAD_REQUEST, "a header is malformed"
        for name in ONCE:
            if len(self.headers.get_all(name, [])) > 1:
                return HTTPStatus.BAD_REQUEST, f"{name} is there twice"
        if not re.fullmatch(r"[0-9]{0,18}", self.headers.get("Content-Length", "")):
            return HTTPStatus.BAD_REQUEST, "Content-Length is no number"
        try:
            host = self.headers.get("Host", "")
            name = host_name(host)
        except ValueError:
            return HTTPStatus.BAD_REQUEST, "Host is missing or malformed"
        if not is_own_name(name, self.public_names):
            return HTTPStatus.FORBIDDEN, "this machine has another name; if it is a proxy's: --public_name"
        origin = self.headers.get("Origin")
        if origin is None:
            return HTTPStatus.OK, ""
        try:
            parts = urlsplit(origin)
            sender = host_name(parts.netloc)
        except ValueError:
            return HTTPStatus.FORBIDDEN, "Origin is of no web page"
        # A proxy may ask for another Host than the page does.
        if parts.netloc.lower() != host.lower() and sender not in map(str.lower, self.public_names):
            return HTTPStatus.FORBIDDEN, "this request comes from another site's page"
        return HTTPStatus.OK, ""

    def answer(self, status: HTTPStatus, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in (
            {"Content_Type": "text/plain; charset=utf-8", "Cache_Control": "no-store"} | headers
        ).items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            with suppress(ConnectionError):  # pages drop videos that they no longer show
                self.wfile.write(body)

    def do_HEAD(self):
        if self.path == "/votes":
            return self.answer(HTTPStatus.NO_CONTENT)  # so the page knows that votes are gathered
        self.do_GET()

    def do_GET(self):
        """A file, whole or the one range that is asked for: Safari plays no video without ranges."""
        path = self.files.get(self.path.partition("?")[0])
        if path is None:
            return self.answer(HTTPStatus.NOT_FOUND, b"not found")
        body = path.read_bytes()
        if path.suffix == ".html":
            return self.answer(HTTPStatus.OK, body, Content_Type="text/html; charset=utf-8")
        headers = {"Content_Type": "video/mp4", "Accept_Ranges": "bytes", "Cache_Control": "private, max-age=86400"}
        asked = re.fullmatch(r"bytes=([0-9]{0,18})-([0-9]{0,18})", self.headers.get("Range", ""))
        if not asked or not any(asked.groups()):
            return self.answer(HTTPStatus.OK, body, **headers)
        first, last = asked.groups()
        start = int(first) if first else max(0, len(body) - int(last))
        end = min(int(last), len(body) - 1) if first and last else len(body) - 1
        if start > end:
            headers["Content_Range"] = f"bytes */{len(body)}"
            return self.answer(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, **headers)
        headers["Content_Range"] = f"bytes {start}-{end}/{len(body)}"
        self.answer(HTTPStatus.PARTIAL_CONTENT, body[start : end + 1], **headers)

    def do_POST(self):
        """JSON lines of votes, all or none of them."""
        length = self.headers.get("Content-Length", "")
        if self.path != "/votes":
            return self.answer(HTTPStatus.NOT_FOUND, b"not found")
        if self.headers.get("Content-Type") != "application/x-ndjson":
            return self.answer(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, b"votes are application/x-ndjson")
        if not length:
            return self.answer(HTTPStatus.LENGTH_REQUIRED, b"no Content-Length")
        if int(length) > MAX_BODY:
            return self.answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, b"too many votes at once")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            return self.answer(HTTPStatus.BAD_REQUEST, b"the votes were cut off")
        try:
            votes = [json.loads(line) for line in body.splitlines()]
            for vote in votes:
                check_vote(vote, self.study)
                if self.annotators and vote["annotator"] not in self.annotators:
                    raise ValueError(f"{vote['annotator']} is not an annotator of this study")
            fresh = self.votes.append(votes)
        except (ValueError, RecursionError) as error:
            return self.answer(HTTPStatus.BAD_REQUEST, str(error).encode())
        except OSError as error:
            print(f"votes cannot be written: {error}", flush=True)
            return self.answer(HTTPStatus.INSUFFICIENT_STORAGE, b"the votes could not be written")
        if fresh:
            print(f"{votes[-1]['annotator']}: {fresh} new vote(s), {len(self.votes.known)} in all", flush=True)
        self.answer(HTTPStatus.OK, str(fresh).encode())


def main(args: argparse.Namespace) -> None:
    if args.folder.resolve() in args.votes.resolve().parents:
        raise SystemExit(f"--votes {args.votes} lies in the study's folder, which annotators get")
    annotators = args.annotators and [annotator.lower() for annotator in args.annotators]
    handler = partial(
        Handler,
        study=read_study(args.folder),
        folder=args.folder,
        votes=VoteFile(args.votes),
        annotators=annotators,
        public_names=args.public_name,
    )
    try:
        server = ThreadingHTTPServer((args.host, args.port), handler)
    except OSError as error:
        raise SystemExit(f"--host {args.host} --port {args.port} cannot be listened at: {error.strerror}") from None
    with server:
        address = f"http://{args.host}:{server.server_port}/"
        print("\n".join(f"{address}?annotator={annotator}" for annotator in annotators or ["ID"]), flush=True)
        if args.host not in ("127.0.0.1", "localhost"):
            print("Whoever reaches this address can vote: there is no password and no encryption.", flush=True)
        # Also where a shell started this in the background and has it ignore Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print(f"{len(handler.keywords['votes'].known)} votes are in {args.votes}")


if __name__ == "__main__":
    run_script(main, parse_args)
