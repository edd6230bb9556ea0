"""The real huggingface_hub client against `hub_server.py`, each time in a process of its own.

Client functions run in the child, so they import huggingface_hub themselves: it reads its environment on import.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer

CARD = b"---\nlicense: apache-2.0\nbase_model: team/base\n---\n\n# A card\n"
WEIGHTS = bytes(range(256)) * 6000  # 1.5 MB


@pytest.fixture
def hub(tmp_path):
    with HubServer(tmp_path / "hub") as server:
        yield server


def run(hub, client, *arguments, token=None):
    """What `client(*arguments)` returns in a new process that knows nothing but the environment of `hub`."""
    code = f"import json, sys, {Path(__file__).stem} as tests; arguments = json.loads(sys.argv[1]);"
    code += f"print(json.dumps(tests.{client.__name__}(*arguments)))"
    env = {**os.environ, **hub.env(token), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def outcome(function, *args, **kwargs):
    """The class and HTTP status of what `function` raises, with the cause behind a RuntimeError, or "ok"."""
    try:
        function(*args, **kwargs)
        return "ok"
    except Exception as error:
        names = [type(error).__name__]
        if isinstance(error, RuntimeError):
            error = error.__cause__
            names.append(type(error).__name__)
        response = getattr(error, "response", None)
        return [*names, *([] if response is None else [response.status_code])]


def count(hub, method, part):
    return sum(request[0] == method and part in request[1] for request in hub.requests)


def upload_three_times(folder, repo_type):
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    api, folder, repo = HfApi(), Path(folder), {"repo_type": repo_type}
    repo["repo_id"] = api.create_repo("my-lora", repo_type=repo_type).repo_id
    first = api.upload_folder(folder_path=folder, **repo).oid
    (folder / "config.json").write_text('{"rank": 64}')
    second = api.upload_folder(folder_path=folder, **repo).oid
    third = api.upload_folder(folder_path=folder, **repo).oid
    result = {
        "repo_id": repo["repo_id"],
        "commits": [first, second, third],
        "history": [commit.commit_id for commit in api.list_repo_commits(**repo)],
        "files": api.list_repo_files(**repo),
        "head": api.repo_info(**repo).sha,
        "snapshot": snapshot_download(**repo),
        "old_config": hf_hub_download(filename="config.json", revision=first, **repo),
    }
    api.delete_folder("unet", **repo)
    api.delete_file("config.json", **repo)
    return result


@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_upload_update_and_download(hub, tmp_path, repo_type):
    files = {"README.md": CARD, "config.json": b'{"rank": 32}', "unet/weights.safetensors": WEIGHTS}
    folder = tmp_path / "folder"
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    result = run(hub, upload_three_times, str(folder), repo_type)

    first, second, third = result["commits"]
    assert result["repo_id"] == "tester/my-lora"
    assert result["history"][:2] == [second, first]
    assert len(result["history"]) == 3  # the third is the initial commit
    assert result["head"] == third == second
    assert count(hub, "PUT", "/lfs/") == 1
    assert count(hub, "POST", "/my-lora/commit/main") == 2 + 2  # the uploads that changed something, the deletions

    updated = {**files, "config.json": b'{"rank": 64}'}
    assert result["files"] == [".gitattributes", *updated]
    for name, data in updated.items():
        assert (Path(result["snapshot"]) / name).read_bytes() == data
    assert Path(result["old_config"]).read_bytes() == files["config.json"]

    def served(revision):
        found = hub.files("my-lora", revision, repo_type)
        return {name: data for name, data in found.items() if name != ".gitattributes"}

    assert (served(first), served(second), served("main")) == (files, updated, {"README.md": CARD})


def use_refs():
    from huggingface_hub import HfApi

    api, repo = HfApi(), {"repo_id": "tester/refs"}
    api.create_repo(**repo)
    commit = api.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", **repo).oid
    api.create_tag(tag="v1", **repo)
    api.create_branch(branch="try/this", **repo)
    api.upload_file(path_or_fileobj=b"2", path_in_repo="a.txt", revision="try/this", **repo)
    refs = api.list_repo_refs(**repo)
    again = {
        "tag": outcome(api.create_tag, tag="v1", **repo),
        "tag, exist_ok": outcome(api.create_tag, tag="v1", exist_ok=True, **repo),
        "branch": outcome(api.create_branch, branch="try/this", **repo),
        "branch, exist_ok": outcome(api.create_branch, branch="try/this", exist_ok=True, **repo),
        "repo": outcome(api.create_repo, **repo),
        "repo, exist_ok": outcome(api.create_repo, exist_ok=True, **repo),
    }
    stale = {"path_or_fileobj": b"3", "path_in_repo": "a.txt", "parent_commit": "0" * 40}
    errors = {
        "no file": outcome(api.hf_hub_download, filename="b.txt", **repo),
        "no revision": outcome(api.hf_hub_download, filename="a.txt", revision="v2", **repo),
        "no repo": outcome(api.hf_hub_download, filename="a.txt", repo_id="tester/nothing"),
        "no branch": outcome(api.upload_file, path_or_fileobj=b"3", path_in_repo="a.txt", revision="v2", **repo),
        "bare name": outcome(api.model_info, "refs"),
        "stale parent": outcome(api.upload_file, **stale, **repo),
        "delete nothing": outcome(api.delete_file, "b.txt", **repo),
    }
    exists = [api.file_exists(filename="a.txt", **repo), api.file_exists(filename="b.txt", **repo)]
    paths = [file.path for file in api.get_paths_info(paths=["a.txt", "b.txt"], **repo)]
    api.delete_tag(tag="v1", **repo)
    api.create_tag(tag="v2", revision="try/this", **repo)
    names = {"branches": sorted(b.name for b in refs.branches), "tags": {t.name: t.target_commit for t in refs.tags}}
    return {"commit": commit, **names, "again": again, "errors": errors, "exists": exists, "paths": paths}


def test_refs_and_missing_things(hub):
    result = run(hub, use_refs)
    assert result["branches"] == ["main", "try/this"]
    assert result["tags"] == {"v1": result["commit"]}
    conflict = ["HfHubHTTPError", 409]
    assert result["again"] == {
        "tag": conflict,
        "tag, exist_ok": "ok",
        "branch": conflict,
        "branch, exist_ok": "ok",
        "repo": conflict,
        "repo, exist_ok": "ok",
    }
    assert result["errors"] == {
        "no file": ["RemoteEntryNotFoundError", 404],
        "no revision": ["RevisionNotFoundError", 404],
        "no repo": ["RepositoryNotFoundError", 404],
        "no branch": ["RevisionNotFoundError", 404],
        "bare name": ["RepositoryNotFoundError", 404],
        "stale parent": ["HfHubHTTPError", 412],
        "delete nothing": ["RemoteEntryNotFoundError", 404],
    }
    assert result["exists"] == [True, False]
    assert result["paths"] == ["a.txt"]
    assert (hub.files("refs")["a.txt"], hub.files("refs", "v2")["a.txt"]) == (b"1", b"2")


def try_everything(tokens):
    from huggingface_hub import HfApi

    owner, file = HfApi(), {"path_or_fileobj": b"1", "path_in_repo": "a.txt"}
    owner.create_repo("open")
    owner.create_repo("closed", private=True)
    owner.upload_file(repo_id="tester/closed", **file)
    table = {}
    for name, token in tokens.items():
        api = HfApi(token=token)
        table[name] = {
            "create new": outcome(api.create_repo, f"tester/new-{name}", exist_ok=True),
            "create existing": outcome(api.create_repo, "tester/open"),
            "create existing, exist_ok": outcome(api.create_repo, "tester/open", exist_ok=True),
            "the same, bare name": outcome(api.create_repo, "open", exist_ok=True),
            "create elsewhere": outcome(api.create_repo, "stranger/new"),
            "check": outcome(api.auth_check, "tester/open"),
            "check write": outcome(api.auth_check, "tester/open", write=True),
            "check private": outcome(api.auth_check, "tester/closed"),
            "check missing": outcome(api.auth_check, "tester/nothing", write=True),
            "check elsewhere": outcome(api.auth_check, "stranger/base", write=True),
            "upload": outcome(api.upload_file, repo_id="tester/open", **file),
            "upload elsewhere": outcome(api.upload_file, repo_id="stranger/base", **file),
            "read": outcome(api.model_info, "stranger/base"),
            "read private": outcome(api.list_repo_files, "tester/closed"),
            "whoami": outcome(api.whoami),
        }
    me = owner.whoami()
    return table, [me["name"], me["auth"]["accessToken"]["role"]]


def test_who_may_do_what(hub):
    hub.add("stranger/base", {"config.json": b"{}"})
    tokens = {"write": hub.token, "read": hub.read_token, "none": False, "wrong": "hf_wrong"}
    table, me = run(hub, try_everything, tokens)
    assert me == ["tester", "write"]
    refused, hidden, wrong = ["HfHubHTTPError", 403], ["RepositoryNotFoundError", 401], ["HfHubHTTPError", 401]
    missing = ["RepositoryNotFoundError", 404]
    assert table["write"] == {
        "create new": "ok",
        "create existing": ["HfHubHTTPError", 409],
        "create existing, exist_ok": "ok",
        "the same, bare name": "ok",
        "create elsewhere": refused,
        "check": "ok",
        "check write": "ok",
        "check private": "ok",
        "check missing": missing,
        "check elsewhere": refused,
        "upload": "ok",
        "upload elsewhere": refused,
        "read": "ok",
        "read private": "ok",
        "whoami": "ok",
    }
    assert table["read"] == {
        "create new": refused,
        "create existing": refused,
        # The client turns the 403 into a pass if the repository can be read, so this proves no write access; by its
        # bare name the client does not find it, so there the 403 stays.
        "create existing, exist_ok": "ok",
        "the same, bare name": refused,
        "create elsewhere": refused,
        "check": "ok",
        "check write": refused,
        "check private": "ok",
        "check missing": missing,
        "check elsewhere": refused,
        "upload": refused,
        "upload elsewhere": refused,
        "read": "ok",
        "read private": "ok",
        "whoami": "ok",
    }
    assert table["none"] == {
        "create new": wrong,
        "create existing": wrong,
        "create existing, exist_ok": "ok",
        "the same, bare name": wrong,
        "create elsewhere": wrong,
        "check": "ok",
        "check write": hidden,
        "check private": hidden,
        "check missing": hidden,
        "check elsewhere": hidden,
        "upload": hidden,
        "upload elsewhere": hidden,
        "read": "ok",
        "read private": hidden,
        "whoami": ["ValueError"],
    }
    assert set(map(tuple, table["wrong"].values())) == {tuple(wrong)}


STAGES = {
    "create": "POST /api/repos/create",
    "yaml": "POST /api/validate-yaml",
    "preupload": "POST /api/models/tester/{name}/preupload/",
    "batch": "POST /tester/{name}.git/info/lfs/objects/batch",
    "put": "PUT /lfs/{sha256}",
    "verify": "POST /tester/{name}.git/info/lfs/verify",
    "commit": "POST /api/models/tester/{name}/commit/",
}
FAULTS = [429, 500, 503, "cut"]


def push(cases):
    """Outcome and the client's own waits of pushing each case, which are all skipped."""
    import time

    slept = []
    time.sleep = slept.append
    from huggingface_hub import HfApi

    api, results = HfApi(), {}
    for name, folder in cases.items():
        slept.clear()

        def create_and_upload(name=name, folder=folder):
            api.create_repo(name)
            api.upload_folder(repo_id=f"tester/{name}", folder_path=folder)

        results[name] = [outcome(create_and_upload), list(slept)]
    return results


def test_what_the_client_retries(hub, tmp_path):
    """Once: a fault that goes away after one request. Always: one that stays.

    With Xet (as against the real Hub) `upload_folder` posts its commits with retries; over LFS, as here, without.
    """
    cases = {}
    for stage, match in STAGES.items():
        for fault in FAULTS:
            for times in ("once", "always"):
                # These stages have no name in their path, and nothing is retried there: one fault, one failure.
                if stage in ("create", "yaml") and times == "always":
                    continue
                name = f"{stage}-{fault}-{times}"
                weights = name.encode() * 200_000  # well above a socket buffer, so that a cut meets a sender
                cases[name] = tmp_path / name
                cases[name].mkdir()
                (cases[name] / "lora.safetensors").write_bytes(weights)
                if stage == "yaml":
                    (cases[name] / "README.md").write_bytes(CARD)
                match_here = match.format(name=name, sha256=hashlib.sha256(weights).hexdigest())
                headers = {"Retry-After": "2"} if fault == 429 else None
                hub.fail(match_here, fault, times=1 if times == "once" else 1000, headers=headers)
    results = run(hub, push, {name: str(folder) for name, folder in cases.items()})

    lost = ("ReadError", "WriteError", "RemoteProtocolError")  # which of them is up to the kernel
    for name, (result, slept) in results.items():
        stage, fault, times = name.split("-")
        if stage in ("create", "yaml", "commit"):
            expected_sleeps = []
        else:
            wait = [3, 3, 3, 3, 3] if fault == "429" else [1, 2, 4, 8, 8]  # Retry-After plus one second
            expected_sleeps = wait[:1] if times == "once" else wait
        assert slept == expected_sleeps, name

        if expected_sleeps and times == "once":
            assert result == "ok", name
            assert hub.files(name)["lora.safetensors"] == name.encode() * 200_000
            continue
        if stage in ("put", "verify"):
            assert result.pop(0) == "RuntimeError", name  # the real error is its __cause__
        if fault == "cut":
            assert len(result) == 1 and result[0] in lost, name
        else:
            assert result == ["HfHubHTTPError", int(fault)], name
        assert stage == "create" or "lora.safetensors" not in hub.files(name)


def push_again(folder):
    from huggingface_hub import HfApi

    api = HfApi()
    repo_id = api.create_repo("lost", exist_ok=True).repo_id
    results = [outcome(api.upload_folder, repo_id=repo_id, folder_path=folder) for _ in range(2)]
    return results, len(api.list_repo_commits(repo_id))


def test_pushing_again_after_a_lost_answer_commits_once(hub, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "lora.safetensors").write_bytes(WEIGHTS)
    hub.fail("/commit/", "lost")
    assert run(hub, push_again, str(tmp_path / "folder")) == [[["ReadError"], "ok"], 2]


def download():
    from huggingface_hub import hf_hub_download

    return hf_hub_download("team/base", "model.safetensors")


def test_download_resumes_and_state_outlives_the_server(hub, tmp_path):
    hub.add("team/base", {"model.safetensors": WEIGHTS}, private=True)
    hub.fail("/resolve/", "cut", method="GET")
    assert Path(run(hub, download)).read_bytes() == WEIGHTS
    assert count(hub, "GET", "/resolve/") == 2
    with HubServer(hub.root) as later:
        assert later.files("team/base")["model.safetensors"] == WEIGHTS
        assert Path(run(later, download, token=later.read_token)).read_bytes() == WEIGHTS


def serve_myself(root):
    with HubServer(Path(root)) as hub:
        os.environ.update(hub.env())
        from huggingface_hub import create_repo, upload_file

        repo_id = create_repo("here", private=True).repo_id
        upload_file(repo_id=repo_id, path_or_fileobj=CARD, path_in_repo="README.md")
        return hub.files(repo_id)["README.md"].decode()


def test_server_and_client_in_one_process(hub, tmp_path):
    assert run(hub, serve_myself, str(tmp_path / "other")) == CARD.decode()
    assert hub.requests == []
