"""Puts the guard around a service. Imported only where Model Armor is asked: its package is optional."""

import logging

from cabochon.server.armor.client import ArmorChecker
from cabochon.server.armor.config import ArmorConfig
from cabochon.server.armor.connections import check_client
from cabochon.server.armor.gate import Gate
from cabochon.server.armor.guard_metrics import GuardMetrics
from cabochon.server.armor.policies import Policies
from cabochon.server.service import Service

logger = logging.getLogger(__name__)


def check_guard(config: ArmorConfig) -> None:
    """What `start_guard` would find wrong, before minutes of loading. Raises ConfigError."""
    check_client()
    Policies(config)


async def start_guard(service: Service, config: ArmorConfig) -> None:
    """On the loop that serves. Raises ConfigError; a template that cannot be used fails readiness instead.

    So that a role which is given later mends it, without loading weights again.
    """
    policies = Policies(config)
    metrics = GuardMetrics(service.metrics.registry)
    checker = ArmorChecker(config, policies, metrics)
    await checker.start()
    if problem := checker.problem():
        logger.error("not ready: %s", problem)
    service.gate = Gate(checker, policies.policy_of, config, metrics, service.lifecycle.predicted_wait_s)
    service.lifecycle.problem = checker.problem
