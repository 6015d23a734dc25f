"""KubeRay 1.7's fields, as far as manifests here may use them, as one JSON schema.

Names and types were written down from the reference of the `ray.io/v1` resources (KubeRay v1.7.0) and, below
`template`, from Kubernetes' own pod specification. What is not listed is refused: a CRD prunes unknown fields
without a word, so that a misspelt one would do nothing.
"""

from __future__ import annotations

from typing import Any

TEXT, WHOLE, FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
NUMBER, TEXTS = {"type": "number"}, {"type": "object", "additionalProperties": {"type": "string"}}
ANY: dict[str, Any] = {"type": "object"}  # deeper than what is used here
NAME = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
QUANTITY = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|[KMGTPE]i?|k)?$"}


def fields(required: str = "", **properties: Any) -> dict[str, Any]:
    """A mapping of these keys and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def listed(item: Any) -> dict[str, Any]:
    return {"type": "array", "items": item}


def among(*values: str) -> dict[str, Any]:
    return {"enum": list(values)}


METADATA = fields("name", name=NAME, namespace=NAME, labels=TEXTS, annotations=TEXTS)
ENV = listed(fields("name", name=TEXT, value=TEXT, valueFrom=ANY))
ENV_FROM = listed(
    fields(
        prefix=TEXT,
        secretRef=fields("name", name=NAME, optional=FLAG),
        configMapRef=fields("name", name=NAME, optional=FLAG),
    )
)
AMOUNTS = {"type": "object", "additionalProperties": QUANTITY}
CONTAINER = fields(
    "name image",
    name=NAME,
    image=TEXT,
    imagePullPolicy=among("Always", "IfNotPresent", "Never"),
    command=listed(TEXT),
    args=listed(TEXT),
    workingDir=TEXT,
    env=ENV,
    envFrom=ENV_FROM,
    ports=listed(fields("containerPort", containerPort=WHOLE, name=NAME, protocol=TEXT)),
    resources=fields(requests=AMOUNTS, limits=AMOUNTS, claims=listed(ANY)),
    volumeMounts=listed(fields("name mountPath", name=NAME, mountPath=TEXT, readOnly=FLAG, subPath=TEXT)),
    livenessProbe=ANY,
    readinessProbe=ANY,
    startupProbe=ANY,
    lifecycle=ANY,
    securityContext=ANY,
)
EXPRESSION = fields(
    "key operator",
    key=TEXT,
    operator=among("In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"),
    values=listed(TEXT),
)
TERMS = fields(
    "nodeSelectorTerms",
    nodeSelectorTerms=listed(fields(matchExpressions=listed(EXPRESSION), matchFields=listed(EXPRESSION))),
)
POD = fields(
    "containers",
    containers=listed(CONTAINER),
    initContainers=listed(CONTAINER),
    volumes=listed(
        fields(
            "name",
            name=NAME,
            configMap=fields(name=NAME, items=listed(ANY), defaultMode=WHOLE, optional=FLAG),
            emptyDir=fields(sizeLimit=QUANTITY, medium=TEXT),
            hostPath=fields("path", path=TEXT, type=TEXT),
            secret=ANY,
            persistentVolumeClaim=ANY,
            ephemeral=ANY,
        )
    ),
    restartPolicy=among("Always", "OnFailure", "Never"),
    terminationGracePeriodSeconds=WHOLE,
    activeDeadlineSeconds=WHOLE,
    nodeSelector=TEXTS,
    nodeName=TEXT,
    serviceAccountName=NAME,
    automountServiceAccountToken=FLAG,
    affinity=fields(
        nodeAffinity=fields(
            requiredDuringSchedulingIgnoredDuringExecution=TERMS,
            preferredDuringSchedulingIgnoredDuringExecution=listed(ANY),
        ),
        podAffinity=ANY,
        podAntiAffinity=ANY,
    ),
    tolerations=listed(
        fields(
            key=TEXT,
            operator=among("Exists", "Equal"),
            value=TEXT,
            effect=among("NoSchedule", "PreferNoSchedule", "NoExecute"),
            tolerationSeconds=WHOLE,
        )
    ),
    priorityClassName=TEXT,
    runtimeClassName=TEXT,
    imagePullSecrets=listed(ANY),
    securityContext=ANY,
    topologySpreadConstraints=listed(ANY),
    hostNetwork=FLAG,
    dnsPolicy=TEXT,
)
TEMPLATE = fields("spec", metadata=fields(labels=TEXTS, annotations=TEXTS), spec=POD)

AUTOSCALER = fields(
    resources=ANY,
    image=TEXT,
    imagePullPolicy=TEXT,
    securityContext=ANY,
    idleTimeoutSeconds=WHOLE,
    upscalingMode=among("Default", "Aggressive", "Conservative"),
    version=among("v1", "v2"),
    env=ENV,
    envFrom=ENV_FROM,
    volumeMounts=listed(ANY),
    command=listed(TEXT),
    args=listed(TEXT),
)
HEAD_GROUP = fields(
    "template",
    template=TEMPLATE,
    headService=ANY,
    enableIngress=FLAG,
    ingressOptions=ANY,
    resources=TEXTS,
    labels=TEXTS,
    rayStartParams=TEXTS,
    serviceType=TEXT,
)
WORKER_GROUP = fields(
    "groupName minReplicas maxReplicas template",
    suspend=FLAG,
    groupName=TEXT,
    replicas=WHOLE,
    minReplicas=WHOLE,
    maxReplicas=WHOLE,
    idleTimeoutSeconds=WHOLE,
    priority=WHOLE,
    resources=TEXTS,
    labels=TEXTS,
    rayStartParams=TEXTS,
    template=TEMPLATE,
    scaleStrategy=ANY,
    numOfHosts=WHOLE,
)
CLUSTER = fields(
    "headGroupSpec",
    upgradeStrategy=ANY,
    authOptions=fields(enableK8sTokenAuth=FLAG, secretName=NAME, mode=among("disabled", "token")),
    suspend=FLAG,
    managedBy=TEXT,
    autoscalerOptions=AUTOSCALER,
    headServiceAnnotations=TEXTS,
    enableInTreeAutoscaling=FLAG,
    gcsFaultToleranceOptions=ANY,
    historyServerOptions=ANY,
    networkPolicy=ANY,
    tlsOptions=fields(enabled=FLAG),
    headGroupSpec=HEAD_GROUP,
    rayVersion=TEXT,
    workerGroupSpecs=listed(WORKER_GROUP),
)
JOB = fields(
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    backoffLimit=WHOLE,
    rayClusterSpec=CLUSTER,
    submitterPodTemplate=TEMPLATE,
    metadata=TEXTS,
    clusterSelector=TEXTS,
    submitterConfig=fields(backoffLimit=WHOLE),
    managedBy=TEXT,
    deletionStrategy=ANY,
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    jobId=TEXT,
    submissionMode=among("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    entrypointResources=TEXT,
    entrypointNumCpus=NUMBER,
    entrypointNumGpus=NUMBER,
    ttlSecondsAfterFinished=WHOLE,
    preRunningDeadlineSeconds={"type": "integer", "minimum": 1},
    shutdownAfterJobFinishes=FLAG,
    suspend=FLAG,
)
CRON = fields(
    "jobTemplate schedule",
    jobTemplate=JOB,
    schedule={"type": "string", "not": {"pattern": "TZ"}},
    timeZone={"type": "string", "minLength": 1},
    suspend=FLAG,
)


def resource(kind: str, version: str, spec: dict[str, Any]) -> dict[str, Any]:
    return fields(
        "apiVersion kind metadata spec",
        apiVersion={"const": version},
        kind={"const": kind},
        metadata=METADATA,
        spec=spec,
    )


SCHEMAS = {
    "ConfigMap": fields(
        "apiVersion kind metadata data",
        apiVersion={"const": "v1"},
        kind={"const": "ConfigMap"},
        metadata=METADATA,
        data=TEXTS,
        immutable=FLAG,
    ),
    "RayJob": resource("RayJob", "ray.io/v1", JOB),
    "RayCronJob": resource("RayCronJob", "ray.io/v1", CRON),
}
