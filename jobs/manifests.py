"""Kubernetes manifests of a scan: a KubeRay RayJob, or a RayCronJob that makes one at every due time.

Invariant: `kubernetes/rayjob.yaml` is the one place where the manifest is written down and explained; here
it is filled in. What is returned is a `List` that is whole: the spec travels in a ConfigMap beside the job,
immutable and named by its digest, so that a scan that runs never sees another spec.

A RayCronJob has no concurrency policy (KubeRay 1.7, alpha): a scan that is still at work when the next one is
due keeps the index by its lease, and the newcomer ends with 75, which here counts as done. A RayJob that
somebody asked for by hand fails with it instead.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from sae_runtime import yamls
from sae_runtime.errors import QUARANTINED, InputError, Interrupted, one_line

SPEC = "/etc/corpuscope/spec.yaml"  # where the head finds it
ENTRYPOINT = f"corpuscope scan {SPEC} --address auto --workers auto"
TEMPLATE = "rayjob.yaml"
# A RayJob's name may have 47 characters (KubeRay adds to it for the cluster and its services), and a
# RayCronJob's gets a suffix for each job.
_LONGEST, _LONGEST_CRON = 47, 36
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


@dataclass(frozen=True)
class Settings:
    """What a cluster's owner changes, None as the template has it; the rest is edited in the manifest."""

    image: str | None = None  # with corpuscope and ray[default] in it
    namespace: str | None = None
    service_account: str | None = None  # may read the corpus and write the index
    machines: int | None = None  # GPU pods of a group at most
    spot: tuple[str, str] | None = None  # label and value of spot nodes


_AS_WRITTEN = Settings()


def rayjob(name: str, entrypoint: str, spec_text: str, settings: Settings = _AS_WRITTEN) -> dict[str, Any]:
    """A `v1 List` of the ConfigMap with the spec and the RayJob that scans it once.

    `entrypoint` is a shell command for the head, where the spec is `SPEC`. Raises InputError where Kubernetes
    would not take the name or the spec does not say `device: cuda`.
    """
    _check_name(name, _LONGEST)
    script, job = _filled(name, entrypoint, spec_text, settings, done=(QUARANTINED,))
    return _list(script, job)


def raycronjob(
    name: str,
    cron: str,
    timezone: str,
    entrypoint: str,
    spec_text: str,
    settings: Settings = _AS_WRITTEN,
) -> dict[str, Any]:
    """A `v1 List` of the ConfigMap and the RayCronJob that makes a RayJob at each time of `cron`.

    `timezone` is an IANA name. Raises InputError as `rayjob` does, and for a zone inside the cron line.
    """
    _check_name(name, _LONGEST_CRON)
    if "TZ" in cron:
        raise InputError(f"schedule: {cron}: KubeRay takes no time zone in the cron line; give it beside it")
    done = (QUARANTINED, Interrupted.exit_code)
    script, job = _filled(name, entrypoint, spec_text, settings, done)
    scheduled = {
        "apiVersion": job["apiVersion"],
        "kind": "RayCronJob",
        "metadata": job["metadata"],
        "spec": {"schedule": cron, "timeZone": timezone, "suspend": False, "jobTemplate": job["spec"]},
    }
    return _list(script, scheduled)


def dump(manifests: dict[str, Any]) -> str:
    """The objects of a `List` as YAML documents, for `kubectl apply -f`."""
    return "---\n".join(
        yaml.dump(item, Dumper=_Dumper, sort_keys=False, width=110) for item in manifests["items"]
    )


def _filled(
    name: str, entrypoint: str, spec_text: str, settings: Settings, done: Iterable[int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(ConfigMap, RayJob) of the template with everything of this scan put in."""
    _check_device(name, spec_text)
    text = (resources.files("jobs") / "kubernetes" / TEMPLATE).read_text(encoding="utf-8")
    # Aliases of the file are one object each: copied, or a change to one pod would be one to all.
    script, job = json.loads(json.dumps(list(yaml.safe_load_all(text))))
    held = {"spec.yaml": spec_text, "run.sh": _script(entrypoint, done)}
    digest = hashlib.blake2b(repr(held).encode(), digest_size=4).hexdigest()
    script["metadata"]["name"] = f"{name}-{digest}"
    script["data"] = held
    job["metadata"]["name"] = name
    if settings.namespace is not None:
        for each in (script, job):
            each["metadata"]["namespace"] = settings.namespace
    cluster = job["spec"]["rayClusterSpec"]
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    for volume in head["template"]["spec"]["volumes"]:
        if "configMap" in volume:
            volume["configMap"]["name"] = script["metadata"]["name"]
    for group in (head, *workers):
        pod = group["template"]["spec"]
        if settings.service_account is not None:
            pod["serviceAccountName"] = settings.service_account
        if settings.image is not None:
            pod["containers"][0]["image"] = settings.image
    for group in workers:
        if settings.machines is not None:
            group["maxReplicas"] = settings.machines
        if settings.spot is not None:
            _place(group["template"]["spec"], *settings.spot)
    return script, job


def _place(pod: dict[str, Any], label: str, value: str) -> None:
    """Another label for spot nodes: the one group asks for it, the other keeps away."""
    if "nodeSelector" in pod:
        for toleration in pod["tolerations"]:
            if toleration["key"] in pod["nodeSelector"]:
                toleration["key"] = label
        pod["nodeSelector"] = {label: value}
    else:
        wanted = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        wanted["nodeSelectorTerms"][0]["matchExpressions"] = [
            {"key": label, "operator": "NotIn", "values": [value]}
        ]


def _script(entrypoint: str, done: Iterable[int]) -> str:
    """A shell script that runs the command and tells Ray which of its exit codes are no failure."""
    codes = "|".join(map(str, done))
    return (
        f"trap : TERM\n{entrypoint}\ncode=$?\ncase $code in\n"
        f'  {codes}) echo "corpuscope: ended with $code, which is no failure here"; exit 0 ;;\n'
        "esac\nexit $code\n"
    )


def _list(*items: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "List", "items": list(items)}


def _check_name(name: str, longest: int) -> None:
    if len(name) > longest or not _NAME.fullmatch(name):
        raise InputError(
            f"{name}: a Kubernetes name has at most {longest} small letters, digits and -, a letter first; "
            "rename the spec"
        )


def _check_device(name: str, spec_text: str) -> None:
    """InputError unless the spec says `device: cuda`: no GPU is there to be seen when the scan begins."""
    try:
        spec = yaml.load(spec_text, yamls.Loader)
        device = spec["model"].get("device", "auto")
    except (yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{name}: the spec cannot be read: {one_line(error)}") from error
    if device != "cuda":
        raise InputError(
            f"{name}: model.device: {device}: this cluster has no GPU before a scan asks for one; write "
            "`device: cuda`"
        )


class _Dumper(yaml.SafeDumper):
    """Text of several lines as a block, and nothing by alias: a person reads and edits it."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)
