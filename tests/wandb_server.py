"""W&B's server on this machine, as far as we ask for it: runs and artifacts, by GraphQL, file stream and uploads.

The schema is written from the operations in wandb 0.31.0's own wandb-core. What it does not know it refuses, and remembers
in `refused`; it says nothing that it has not been told.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from aiohttp import web
from graphql import build_schema, graphql_sync

ENTITY = "museum"
FEATURES = [
    "ARTIFACT_DIGEST_ALGORITHM",
    "CLIENT_IDS",
    "FILESTREAM_GZIP",
    "LARGE_FILENAMES",
    "USE_ARTIFACT_WITH_ENTITY_AND_PROJECT_INFORMATION",
]
SCHEMA = build_schema("""
scalar JSONString

type Query { serverInfo: ServerInfo! model(name: String, entityName: String): Project }
type ServerInfo { features: [Feature!]! }
type Feature { name: String! isEnabled: Boolean! }
type Entity { id: ID! name: String! }
type Project { id: ID! name: String! entity: Entity! bucket(name: String!, missingOk: Boolean): Run }
type Artifact { id: ID! state: String! digest: String! artifactSequence: ArtifactSequence! }
type ArtifactSequence { latestArtifact: Artifact }
type Run {
  id: ID! name: String! displayName: String! description: String config: JSONString! sweepName: String project: Project!
  tags: [String!]! notes: String summaryMetrics: JSONString! historyLineCount: Int! eventsLineCount: Int! logLineCount: Int!
  historyTail: JSONString! eventsTail: JSONString! wandbConfig(keys: [String!]!): JSONString!
}

type Mutation {
  upsertBucket(input: UpsertBucketInput!): UpsertBucketPayload
  createRunFiles(input: CreateRunFilesInput!): CreateRunFilesPayload
  createArtifact(input: CreateArtifactInput!): CreateArtifactPayload
  createArtifactManifest(input: CreateArtifactManifestInput!): CreateArtifactManifestPayload
  createArtifactFiles(input: CreateArtifactFilesInput!): CreateArtifactFilesPayload
  commitArtifact(input: CommitArtifactInput!): CommitArtifactPayload
  useArtifact(input: UseArtifactInput!): UseArtifactPayload
}
input UpsertBucketInput {
  id: String name: String groupName: String modelName: String entityName: String description: String displayName: String
  notes: String config: JSONString commit: String host: String debug: Boolean jobProgram: String jobRepo: String
  jobType: String state: String sweep: String tags: [String!] summaryMetrics: JSONString
}
type UpsertBucketPayload { bucket: Run! inserted: Boolean! }
input CreateRunFilesInput { entityName: String! projectName: String! runName: String! files: [String!]! }
type CreateRunFilesPayload { runID: ID! uploadHeaders: [String!]! files: [RunFile!]! }
type RunFile { name: String! uploadUrl: String! }
enum ArtifactDigestAlgorithm { MANIFEST_MD5 }
input ArtifactAliasInput { artifactCollectionName: String! alias: String! }
input CreateArtifactInput {
  entityName: String! projectName: String! artifactTypeName: String! artifactCollectionName: String!
  artifactCollectionNames: [String!] runName: String digest: String! digestAlgorithm: ArtifactDigestAlgorithm! description: String
  labels: JSONString metadata: JSONString
  aliases: [ArtifactAliasInput!] historyStep: Int enableDigestDeduplication: Boolean! distributedID: String clientID: ID!
  sequenceClientID: ID! clientMutationId: String storageRegion: String ttlDurationSeconds: Int
}
type CreateArtifactPayload { artifact: Artifact! }
type CommitArtifactPayload { artifact: Artifact! }
type UseArtifactPayload { artifact: Artifact! }
enum ArtifactManifestType { FULL }
input CreateArtifactManifestInput {
  artifactID: ID! baseArtifactID: ID name: String! digest: String! entityName: String! projectName: String! runName: String!
  type: ArtifactManifestType!
}
type CreateArtifactManifestPayload { artifactManifest: ArtifactManifest! }
type ArtifactManifest { id: ID! file: File! }
type File {
  id: ID! uploadUrl: String uploadHeaders: [String!]! storagePath: String uploadMultipartUrls: Parts artifact: Artifact!
}
type Parts { uploadID: ID! uploadUrlParts: [Part!]! }
type Part { partNumber: Int! uploadUrl: String! }
enum ArtifactStorageLayout { V2 }
input CreateArtifactFilesInput {
  artifactFiles: [CreateArtifactFileSpecInput!]! storageLayout: ArtifactStorageLayout!
  digestAlgorithm: ArtifactDigestAlgorithm clientMutationId: String cloudRegionID: ID
}
input CreateArtifactFileSpecInput {
  artifactID: ID! artifactManifestID: ID! name: String! md5: String! digest: String
  mimetype: String uploadPartsInput: [PartInput!]
}
input PartInput { hexMD5: String! partNumber: Int! }
type CreateArtifactFilesPayload { files: FileConnection! }
type FileConnection { edges: [FileEdge!]! }
type FileEdge { node: File! }
input CommitArtifactInput { artifactID: ID! }
input UseArtifactInput {
  artifactID: ID! artifactEntityName: String artifactProjectName: String entityName: String! projectName: String! runName: String!
  usedAs: String clientMutationId: String
}
""")


@dataclass
class Run:
    """`streams` are the lines of the files that it streams, each in its place; `files` are those uploaded whole."""

    project: str
    name: str
    display_name: str = ""
    job_type: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    streams: dict[str, list[str]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    uses: set[str] = field(default_factory=set)  # artifacts' ids
    exit_code: int | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.streams.get("wandb-history.jsonl", [])]

    def node(self) -> dict[str, Any]:
        """As GraphQL sees it."""
        history, events, summary = (
            self.streams.get(f"wandb-{name}", []) for name in ("history.jsonl", "events.jsonl", "summary.json")
        )
        return {
            "id": f"run/{self.project}/{self.name}",
            "name": self.name,
            "displayName": self.display_name,
            "config": json.dumps(self.config),
            "project": project_node(self.project),
            "tags": [],
            "summaryMetrics": summary[-1] if summary else "{}",
            "historyLineCount": len(history),
            "eventsLineCount": len(events),
            "logLineCount": len(self.streams.get("output.log", [])),
            "historyTail": json.dumps(history[-1:]),
            "eventsTail": json.dumps(events[-1:]),
            "wandbConfig": lambda _, keys: json.dumps({key: self.config["_wandb"]["value"][key] for key in keys}),
        }


@dataclass
class Artifact:
    """A version in a collection."""

    id: str
    type: str
    collection: str
    digest: str
    metadata: dict[str, Any]
    client: str  # its id before it had one here, by which a run's history names it
    aliases: set[str] = field(default_factory=set)
    files: dict[str, bytes] = field(default_factory=dict)
    manifest: bytes = b""
    committed: bool = False

    def check(self) -> None:
        """Raises AssertionError unless its files are those of the manifest, and its digest is the manifest's (MANIFEST_MD5)."""
        entries = {path: entry["digest"] for path, entry in json.loads(self.manifest)["contents"].items()}
        assert entries == {path: md5(data) for path, data in self.files.items()}, f"{self.collection} is not whole"
        lines = "".join(f"{path}:{digest}\n" for path, digest in sorted(entries.items()))
        assert self.digest == hashlib.md5(f"wandb-artifact-manifest-v1\n{lines}".encode()).hexdigest(), (
            f"{self.collection}'s digest"
        )

    def node(self, latest: Artifact | None) -> dict[str, Any]:
        """As GraphQL sees it."""
        state = "COMMITTED" if self.committed else "PENDING"
        sequence = {"latestArtifact": {"id": latest.id} if latest else None}
        return {"id": self.id, "state": state, "digest": self.digest, "artifactSequence": sequence}


def md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data).digest()).decode()


def project_node(name: str) -> dict[str, Any]:
    return {"id": f"project/{name}", "name": name, "entity": {"id": ENTITY, "name": ENTITY}}


class WandbServer:
    """Runs by name and artifacts by id. `mode` is how it answers: as it should, `failing` (500), or `silent` (not at all)."""

    def __init__(self, key: str) -> None:
        self.key, self.mode, self.port, self._thread = key, "", 0, threading.Thread()
        self.runs, self.artifacts = dict[str, Run](), dict[str, Artifact]()
        self.asked, self.refused, self.bodies = list[str](), list[str](), list[bytes]()
        self.root: dict[str, Any] = {
            "serverInfo": {"features": [{"name": name, "isEnabled": True} for name in FEATURES]},
            "model": self.model,
            "upsertBucket": self.upsert_bucket,
            "createRunFiles": self.create_run_files,
            "createArtifact": self.create_artifact,
            "createArtifactManifest": self.create_manifest,
            "createArtifactFiles": self.create_artifact_files,
            "commitArtifact": self.commit_artifact,
            "useArtifact": self.use_artifact,
        }

    # Over HTTP

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """In a thread, on a free port, and the next time on the same one; where it runs already, nothing happens."""
        if self._thread.is_alive():
            return
        app = web.Application(client_max_size=2**26, middlewares=[self.admit])
        app.router.add_post("/graphql", self.graphql)
        app.router.add_post("/files/{entity}/{project}/{run}/file_stream", self.file_stream)
        app.router.add_put("/upload/{kind}/{owner}/{name:.+}", self.upload)
        runner, started = web.AppRunner(app, shutdown_timeout=0.1), threading.Event()

        async def serve() -> None:
            self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", self.port).start()
            self.port = runner.addresses[0][1]
            started.set()
            await self._over.wait()
            await runner.cleanup()

        self._thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
        self._thread.start()
        assert started.wait(30)

    def stop(self) -> None:
        """What it keeps outlives it."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._over.set)
            self._thread.join()

    @web.middleware
    async def admit(self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.Response]]) -> web.Response:
        """Whoever has the key. What is refused, or not known, is remembered."""
        if self.mode == "failing":
            return web.json_response({"error": "made to fail"}, status=500)
        if self.mode == "silent":
            await self._over.wait()
            raise web.HTTPServiceUnavailable
        body = await request.read()
        self.bodies.append(body)
        if (
            request.method != "PUT"
            and request.headers.get("Authorization") != f"Basic {base64.b64encode(f'api:{self.key}'.encode()).decode()}"
        ):
            return web.json_response({"error": "the key is wrong"}, status=401)  # an upload's address is its permission
        try:
            return await handler(request)
        except Exception as error:
            self.refused.append(f"{request.method} {request.path}: {type(error).__name__} {error}")
            return web.json_response({"errors": [{"message": self.refused[-1]}]}, status=400)

    async def graphql(self, request: web.Request) -> web.Response:
        asked = await request.json()
        name = asked.get("operationName") or asked["query"]
        self.asked.append(name)
        result = graphql_sync(
            SCHEMA, asked["query"], self.root, variable_values=asked.get("variables"), operation_name=asked.get("operationName")
        )
        assert not result.errors, f"{name}: {result.errors}"
        return web.json_response({"data": result.data})

    async def file_stream(self, request: web.Request) -> web.Response:
        sent, run = await request.json(), self.runs[request.match_info["run"]]
        assert sent.keys() <= {"files", "uploaded", "complete", "exitcode"}, sent
        for name, chunk in sent.get("files", {}).items():
            lines = run.streams.setdefault(name, [])
            assert chunk["offset"] <= len(lines), f"{name} has {len(lines)} lines, not {chunk['offset']}"
            lines[chunk["offset"] : chunk["offset"] + len(chunk["content"])] = chunk["content"]
        assert set(sent.get("uploaded", [])) <= run.files.keys(), f"{sent['uploaded']} of {sorted(run.files)}"
        run.exit_code = sent["exitcode"] if sent.get("complete") else None
        return web.json_response({"exitcode": None, "limits": {}})

    async def upload(self, request: web.Request) -> web.Response:
        kind, owner, name = (request.match_info[part] for part in ("kind", "owner", "name"))
        data = await request.read()
        if kind == "run":
            self.runs[owner].files[name] = data
        elif kind == "manifest":
            self.artifacts[owner].manifest = data
        else:
            self.artifacts[owner].files[name] = data
        return web.Response()

    # In GraphQL

    def model(self, _: Any, name: str, **__: str) -> dict[str, Any]:
        def bucket(_: Any, name: str, **__: bool) -> dict[str, Any] | None:
            return self.runs[name].node() if name in self.runs else None

        return {**project_node(name), "bucket": bucket}

    def newest(self, collection: str) -> Artifact | None:
        """A collection's latest version that is whole."""
        return next((one for one in reversed(self.artifacts.values()) if one.collection == collection and one.committed), None)

    def upsert_bucket(self, _: Any, input: dict[str, Any]) -> dict[str, Any]:
        given = {key: value for key, value in input.items() if value is not None}
        name = given["id"].rsplit("/", 1)[-1] if "id" in given else given["name"]
        inserted = name not in self.runs
        run = self.runs.setdefault(name, Run(given.get("modelName", ""), name))
        run.display_name, run.job_type = given.get("displayName", run.display_name), given.get("jobType", run.job_type)
        run.config = json.loads(given["config"]) if "config" in given else run.config
        return {"bucket": run.node(), "inserted": inserted}

    def create_run_files(self, _: Any, input: dict[str, Any]) -> dict[str, Any]:
        run = self.runs[input["runName"]]
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/run/{run.name}/{quote(name)}"} for name in input["files"]]
        return {"runID": run.node()["id"], "uploadHeaders": [], "files": files}

    def create_artifact(self, _: Any, input: dict[str, Any]) -> dict[str, Any]:
        """The collection's latest where its content is the same, else a new one; its aliases leave the others."""
        made = self.newest(input["artifactCollectionName"])
        if made is None or made.digest != input["digest"]:
            metadata = json.loads(input.get("metadata") or "{}")
            made = Artifact(
                id=str(len(self.artifacts)),
                type=input["artifactTypeName"],
                collection=input["artifactCollectionName"],
                digest=input["digest"],
                metadata=metadata,
                client=input["clientID"],
            )
            self.artifacts[made.id] = made
        named = {alias["alias"] for alias in input.get("aliases") or []}
        for other in self.artifacts.values():
            if other.collection == made.collection:
                other.aliases -= named
        made.aliases |= named
        return {"artifact": made.node(self.newest(made.collection))}

    def create_manifest(self, _: Any, input: dict[str, Any]) -> dict[str, Any]:
        made, run = self.artifacts[input["artifactID"]], self.runs[input["runName"]]
        url = f"{self.url}/upload/manifest/{made.id}/{input['name']}"
        return {
            "artifactManifest": {"id": f"{run.name}/{made.id}", "file": {"id": made.id, "uploadUrl": url, "uploadHeaders": []}}
        }

    def create_artifact_files(self, _: Any, input: dict[str, Any]) -> dict[str, Any]:
        edges = []
        for asked in input["artifactFiles"]:
            url = f"{self.url}/upload/artifact/{asked['artifactID']}/{quote(asked['name'])}"
            artifact = {"id": asked["artifactID"]}
            edges.append(
                {
                    "node": {
                        "storagePath": None,
                        "uploadUrl": url,
                        "uploadHeaders": [],
                        "uploadMultipartUrls": None,
                        "artifact": artifact,
                    }
                }
            )
        return {"files": {"edges": edges}}

    def commit_artifact(self, _: Any, input: dict[str, Any]) -> dict[str, Any]:
        made = self.artifacts[input["artifactID"]]
        made.check()
        made.committed = True
        return {"artifact": made.node(made)}

    def use_artifact(self, _: Any, input: dict[str, Any]) -> dict[str, Any]:
        used = self.artifacts[input["artifactID"]]
        assert used.committed, f"{used.collection} is used before it is whole"
        self.runs[input["runName"]].uses.add(used.id)
        return {"artifact": used.node(used)}
