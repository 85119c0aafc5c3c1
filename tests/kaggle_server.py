"""A server that answers as Kaggle does, for the unpatched client: what arrives is kept, what goes wrong is injected.

It stands behind `http_proxy`, with KAGGLE_API_ENVIRONMENT=LOCALHOST, so the client's addresses stay its own.
"""
import base64
import http.server
import json
import sys
import threading
import time
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

HTML = b"<!DOCTYPE html><html><title>Just a moment...</title><body>checking your browser</body></html>"
TOKENS = dict(KGAT_good="tokenuser", KGAT_browser="browseruser")          # access token -> its user
KEYS = dict(someone="0" * 32)                                             # legacy name -> key
MACHINES = ("NvidiaTeslaT4", "NvidiaTeslaP100", "")


class Refusal(Exception):
    "An HTTP error with the JSON that Kaggle puts into it."
    def __init__(self, status, message): self.status, self.message = status, message


@dataclass
class Fault:
    "What goes wrong with a request: cut, close, slow, html, empty, nothing, garbage, or a status."
    kind: object
    times: int = 1
    message: str = "injected"
    seconds: float = 1.
    headers: dict = field(default_factory=dict)


@dataclass
class Version:
    "A version of a kernel: what was sent, and how it goes."
    sent: dict
    states: list = field(default_factory=lambda: ["QUEUED", "RUNNING", "COMPLETE"])    # one a question, the last stays
    message: str = ""
    log: list = field(default_factory=list)
    files: dict = field(default_factory=dict)

    def state(self): return self.states.pop(0) if len(self.states) > 1 else self.states[0]


class KaggleServer:
    "The state of a small Kaggle, and the server that shows it."
    def __init__(self):
        self.arrived, self.faults, self.kernels, self.datasets, self.blobs = [], {}, {}, {}, {}
        self.joined, self.notebooks_only = {"el-hackathon-2025"}, set()
        self.known_datasets, self.known_models = set(), set()
        self.submissions, self.scores, self.left, self.page_size = [], [], 5, 2
        self.quota, self.sessions, self.unpack, self.loses = ("36000s", "108000s"), 0, 1, set()
        self.next = Version({})                        # how the next pushed version goes
        self.errors = []                               # of this server
        self.http = Server(("127.0.0.1", 0), Answers)
        self.http.kaggle = self
        self.address = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(.01,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    def fault(self, method, kind, times=1, **more): self.faults[method] = Fault(kind, times, **more)

    def sent(self, method):
        "What arrived for a method, oldest first."
        return [body for name, body in self.arrived if name == method]

    def add(self, ref, *versions): self.kernels[ref] = list(versions)

    # --- kernels

    def versions(self, body):
        ref = f"{body['userName']}/{body['kernelSlug']}"
        if ref not in self.kernels: raise Refusal(403, "Permission 'kernels.get' was denied")
        return self.kernels[ref]

    def version(self, body):
        "The version that a label such as v3 names; the newest without one. A bare number is not found."
        versions, label = self.versions(body), body.get("versionLabel")
        if not label: return versions[-1]
        if label not in [f"v{i + 1}" for i in range(len(versions))]: raise Refusal(404, "Not found")
        return versions[int(label[1:]) - 1]

    def SaveKernel(self, body):
        if self.sessions >= 2 and body["enableGpu"]:
            return dict(error="Maximum batch GPU session count of 2 reached.")
        refused = lambda name, known: [s for s in body.get(name) or () if s not in known]
        others = set(self.kernels)
        version, self.next = self.next, Version({})
        version.sent = dict(body)
        if body.get("kernelExecutionType") == "QUICK_SAVE": version.states = ["ERROR"]
        versions = self.kernels.setdefault(body["slug"], [])
        versions.append(version)
        return dict(ref=f"/code/{body['slug']}", url=f"https://www.kaggle.com/code/{body['slug']}", kernelId=7,
            versionNumber=len(versions), invalidCompetitionSources=refused("competitionDataSources", self.joined),
            invalidDatasetSources=refused("datasetDataSources", self.known_datasets | set(self.datasets)),
            invalidModelSources=refused("modelDataSources", self.known_models),
            invalidKernelSources=refused("kernelDataSources", others), invalidTags=refused("categoryIds", ()))

    def GetKernel(self, body):
        versions = self.versions(body)
        sent, shape = versions[-1].sent, versions[-1].sent.get("machineShape") or ""
        about = dict(ref=f"{body['userName']}/{body['kernelSlug']}", currentVersionNumber=len(versions),
            machineShape=shape if shape in MACHINES else "Gpu",
            competitionDataSources=sent.get("competitionDataSources") or [])
        return dict(metadata=about, blob=dict(source="{}"))

    def GetKernelSessionStatus(self, body):
        version = self.version(body)
        status = dict(status=version.state())
        if status["status"] == "ERROR" and version.message: status["failureMessage"] = version.message
        return status

    def ListKernelSessionOutput(self, body):
        version, ref = self.version(body), f"{body['userName']}/{body['kernelSlug']}"
        number = self.versions(body).index(version) + 1
        start, names = int(body.get("pageToken") or 0), sorted(version.files)
        page, after = names[start:start + self.page_size], start + self.page_size
        files = [dict(fileName=n, url=f"http://localhost/files/{ref}/{number}/{n}") for n in page]
        pieces = [dict(stream_name="stdout", time=float(i), data=f"{line}\n") for i, line in enumerate(version.log)]
        more = dict(nextPageToken=str(after)) if after < len(names) else {}
        return dict(files=files, log=json.dumps(pieces)) | more

    def GetAcceleratorQuotaStatistics(self, body):
        if self.quota is None: return {}
        used, total = self.quota
        return dict(quotaRefreshTime="2026-12-05T00:00:00Z", gpuQuota=dict(timeUsed=used, totalTimeAllowed=total))

    # --- log-in

    def IntrospectToken(self, body):
        user = TOKENS.get(body["token"])
        return dict(active=bool(user)) | (dict(username=user) if user else {})

    def GenerateAccessToken(self, body):
        if body["refreshToken"] != "refresh_good": raise Refusal(401, "Unauthenticated")
        return dict(token="KGAT_browser", expiresIn=3600, userName="browseruser")

    # --- competitions

    def GetCompetition(self, body):
        slug = body["competitionName"]
        if slug == "unknown": raise Refusal(404, "Not found")
        return dict(id=1, ref=f"https://www.kaggle.com/competitions/{slug}", userHasEntered=slug in self.joined,
            isKernelsSubmissionsOnly=slug in self.notebooks_only)

    def GetSubmissionLimits(self, body): return dict(numToday=5 - self.left, numTotal=9, numAllowedNow=self.left)

    def StartSubmissionUpload(self, body):
        token = f"blob{len(self.blobs)}"
        self.blobs[token] = None
        return dict(token=token, createUrl=f"http://localhost/upload/{token}")

    def CreateSubmission(self, body):
        if self.blobs.get(body["blobFileTokens"]) is None: raise Refusal(400, "The file was never uploaded")
        return self._submitted(body)

    def CreateCodeSubmission(self, body): return self._submitted(body)

    def _submitted(self, body):
        ref = 41 + len(self.submissions)
        self.submissions.append(dict(ref=ref, description=body.get("submissionDescription", "")))
        return dict(message="Successfully submitted", ref=ref)

    def ListSubmissions(self, body):
        now = self.scores.pop(0) if len(self.scores) > 1 else (self.scores or [dict(status="PENDING")])[0]
        old = dict(ref=7, status="COMPLETE", publicScore="0.9999")                     # somebody else's, earlier
        return dict(submissions=[*(s | now for s in self.submissions[::-1]), old])

    # --- datasets

    def _dataset(self, body):
        ref = f"{body['ownerSlug']}/{body['datasetSlug']}"
        if ref not in self.datasets: raise Refusal(403, "Permission 'datasets.get' was denied")
        return self.datasets[ref]

    def GetDatasetStatus(self, body):
        about = self._dataset(body)
        about["waits"] -= 1
        return dict(status="READY" if about["waits"] < 0 else "BLOBS_RECEIVED")

    def GetDataset(self, body): return dict(currentVersionNumber=self._dataset(body)["version"])

    def ListDatasetFiles(self, body):
        files = self._dataset(body)["files"]
        return dict(datasetFiles=[dict(name=name, totalBytes=size) for name, size in files.items()])

    def StartBlobUpload(self, body):
        token = f"blob{len(self.blobs)}-{body['name']}"
        self.blobs[token] = None
        return dict(token=token, createUrl=f"http://localhost/upload/{token}")

    def _stored(self, files):
        tokens = [f["token"] for f in files]
        return {t.split("-", 1)[1]: len(self.blobs[t]) for t in tokens if t.split("-", 1)[1] not in self.loses}

    def CreateDataset(self, body):
        ref = f"{body['ownerSlug']}/{body['slug']}"
        files = self._stored(body.get("files", ()))
        self.datasets[ref] = dict(version=1, waits=self.unpack, files=files)
        return dict(ref=ref, url=f"https://www.kaggle.com/datasets/{ref}", status="ok")

    def CreateDatasetVersion(self, body):
        about = self._dataset(body)
        files = self._stored(body["body"].get("files", ()))
        about.update(version=about["version"] + 1, waits=self.unpack, files=files)
        return dict(status="ok")


class Server(http.server.ThreadingHTTPServer):
    "Takes no offence at a client that hangs up, and keeps what else goes wrong."
    daemon_threads = True

    def handle_error(self, request, client_address):
        if not isinstance(error := sys.exc_info()[1], ConnectionError): self.kaggle.errors.append(error)


class Answers(http.server.BaseHTTPRequestHandler):
    "One request after another."
    protocol_version = "HTTP/1.1"

    def log_message(self, *args): pass

    def reply(self, status, body, kind="application/json", cut=False, **headers):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items(): self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:len(body) // 2] if cut else body)
        if cut: self.close_connection = True

    def user(self):
        "Who asks; None where the log-in is not known."
        kind, _, secret = self.headers.get("Authorization", "").partition(" ")
        if kind == "Bearer": return TOKENS.get(secret)
        name, _, key = base64.b64decode(secret or b"").decode().partition(":")
        return name if key and KEYS.get(name) == key else None

    def spoiled(self, name, good):
        "Answer with what was injected; False where nothing was."
        fault = self.server.kaggle.faults.get(name)
        if fault is None or not fault.times: return False
        fault.times -= 1
        if fault.kind == "slow":
            time.sleep(fault.seconds)
            return False
        if fault.kind == "close": self.close_connection = True
        elif fault.kind == "cut": self.reply(200, good(), cut=True)
        elif fault.kind == "html": self.reply(200, HTML, "text/html")
        elif fault.kind == "html503": self.reply(503, HTML, "text/html")
        elif fault.kind in ("empty", "garbage", "nothing"):
            self.reply(200, dict(empty=b"{}", garbage=b"[1, 2]", nothing=b"")[fault.kind])
        else: self.refuse(Refusal(fault.kind, fault.message), **fault.headers)
        return True

    def refuse(self, e, **headers):
        self.reply(e.status, json.dumps(dict(code=e.status, message=e.message)).encode(), **headers)

    def do_POST(self):
        kaggle, name = self.server.kaggle, urlsplit(self.path).path.rpartition("/")[2]
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        kaggle.arrived.append((name, body))
        answer = lambda: json.dumps(getattr(kaggle, name)(body)).encode()
        if self.spoiled(name, answer): return
        public = name in ("IntrospectToken", "GenerateAccessToken")
        if not (public or self.user()): return self.refuse(Refusal(401, "Unauthenticated"))
        try: self.reply(200, answer())
        except Refusal as e: self.refuse(e)

    def do_PUT(self):
        chunked = "chunked" in self.headers.get("Transfer-Encoding", "")
        data = self._chunks() if chunked else self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = unquote(urlsplit(self.path).path.rpartition("/")[2])
        self.server.kaggle.arrived.append(("PUT", data))
        if self.spoiled("PUT", lambda: b"{}"): return
        self.server.kaggle.blobs[token] = data
        self.reply(200, b"{}")

    def _chunks(self):
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_GET(self):
        kaggle, parts = self.server.kaggle, unquote(urlsplit(self.path).path).strip("/").split("/")
        kaggle.arrived.append(("GET", "/".join(parts)))
        if parts[:1] == ["files"]: return self._file(kaggle, "/".join(parts[1:3]), int(parts[3]), "/".join(parts[4:]))
        if "stream" in parts: return self._stream(kaggle, "/".join(parts[-2:]))
        self.refuse(Refusal(404, "Not found"))

    def _file(self, kaggle, ref, number, name):
        content = kaggle.kernels[ref][number - 1].files[name]
        if not self.spoiled(name, lambda: content): self.reply(200, content, "application/octet-stream")

    def _stream(self, kaggle, ref):
        "The log of the newest version, a piece at a time; cut where that was injected."
        lines = kaggle.kernels[ref][-1].log if ref in kaggle.kernels else []
        fault = kaggle.faults.get("stream")
        broken = fault is not None and fault.times > 0
        if broken: fault.times -= 1
        events = [f"data: {json.dumps(dict(stream_name='stdout', data=line + chr(10)))}\n\n" for line in lines]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in events[:len(events) // 2] if broken else [*events, "data: END_OF_LOG\n\n"]:
            self.wfile.write(f"{len(event.encode()):x}\r\n{event}\r\n".encode())
        if not broken: self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True
