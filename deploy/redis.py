"""Where the head's state outlives the head: one Redis with a disk and a password."""

from __future__ import annotations

from typing import Any

IMAGE = "redis:8.2-alpine"


def redis(secret: str, labels: dict[str, str]) -> list[dict[str, Any]]:
    """A Service and a StatefulSet."""
    app = {"app": "redis"}
    metadata = {"name": "redis", "labels": labels | app}
    service = {"clusterIP": "None", "selector": app, "ports": [{"name": "redis", "port": 6379}]}
    return [
        {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": service},
        {
            "apiVersion": "apps/v1",
            "kind": "StatefulSet",
            "metadata": metadata,
            "spec": {
                "serviceName": "redis",
                "replicas": 1,
                "selector": {"matchLabels": app},
                "template": {"metadata": {"labels": labels | app}, "spec": pod(secret)},
                "volumeClaimTemplates": [
                    {
                        "metadata": {"name": "data"},
                        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "2Gi"}}},
                    }
                ],
            },
        },
    ]


def pod(secret: str) -> dict[str, Any]:
    check = ["sh", "-c", 'redis-cli -a "$REDIS_PASSWORD" --no-auth-warning ping']
    return {
        "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 999, "fsGroup": 999},
        "containers": [
            {
                "name": "redis",
                "image": IMAGE,
                "args": ["sh", "-c", 'exec redis-server --appendonly yes --dir /data --requirepass "$REDIS_PASSWORD"'],
                "env": [{"name": "REDIS_PASSWORD", "valueFrom": {"secretKeyRef": {"name": secret, "key": "REDIS_PASSWORD"}}}],
                "ports": [{"containerPort": 6379}],
                "readinessProbe": {"exec": {"command": check}, "periodSeconds": 10},
                "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"memory": "512Mi"}},
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                "volumeMounts": [{"name": "data", "mountPath": "/data"}],
            }
        ],
    }
