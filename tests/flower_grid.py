"""A Flower grid that is a dict, for tests of the backend without Flower's processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

__all__ = ["DictGrid"]


@dataclass
class DictGrid:
    """Nodes that answer at once: node id to a function of bytes, which may return None (never answers) or a message."""

    nodes: dict = field(default_factory=dict)
    seen: list = field(default_factory=list)
    waiting: dict = field(default_factory=dict)
    since: dict = field(default_factory=dict)

    def get_nodes(self):
        """The nodes that are there, and when each has come."""
        from flwr.supercore.task_identity import TaskIdentity

        for key in ("_task_id", "_run_id", "_node_id"):  # a ServerApp's process is told whose it is when it starts
            setattr(TaskIdentity, key, 1)
        return [SimpleNamespace(node_id=node, last_activated_at=self.since.get(node, "")) for node in self.nodes]

    def push_messages(self, messages):
        """Give each to its node."""
        from fedbiscuit.backends.flower_messages import message_bytes, record_of

        ids = []
        for message in messages:
            node, data = message.metadata.dst_node_id, message_bytes(message)
            self.seen.append((node, data))
            answer = self.nodes[node](data)
            ids.append(f"id-{len(self.seen)}")
            if answer is not None:
                content = record_of(answer) if isinstance(answer, bytes) else answer
                meta = SimpleNamespace(reply_to_message_id=ids[-1])
                self.waiting[ids[-1]] = SimpleNamespace(metadata=meta, content=content, has_error=lambda: False)
        return ids

    def pull_messages(self, ids):
        """What has been answered."""
        return [self.waiting.pop(one) for one in ids if one in self.waiting]
