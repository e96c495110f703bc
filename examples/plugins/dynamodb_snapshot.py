"""Snapshots in DynamoDB, in the table of TorchServe's plugin: what that has saved is read, and the other way round.

The table `Snapshots` has the keys snapshotName (hash) and createdOn (range), and an index createdOnMonth-index with
createdOnMonth (hash) and createdOn (range). Region and credentials are boto3's (AWS_REGION, AWS_ACCESS_KEY_ID ...).
"""

import json
from datetime import datetime

import boto3
from boto3.dynamodb.conditions import Key

from wsgi_ts.plugins import plugin
from wsgi_ts.settings.properties import format_property, parse_properties

TABLE = "Snapshots"
INDEX = "createdOnMonth-index"


@plugin("snapshot", name="dynamodb")
class DynamoDbSnapshots:
    def __init__(self):
        self._table = boto3.resource("dynamodb").Table(TABLE)

    def save(self, name, properties):
        snapshot = json.loads(properties["model_snapshot"])
        created = datetime.fromtimestamp(snapshot["created"] / 1000)
        self._table.put_item(
            Item={
                "snapshotName": f"{name}_{snapshot['created']}_{snapshot['modelCount']}",
                "createdOn": f"{created:%Y-%m-%d %H:%M:%S},{created.microsecond // 1000:03d}",
                "createdOnMonth": f"{created:%Y-%m}",
                "snapshot": "\n".join(["#snapshot", *(format_property(*each) for each in properties.items()), ""]),
            }
        )

    def last(self):
        # The index is by month: the newest of this one, else of one of the eleven before it.
        year, month = datetime.now().year, datetime.now().month
        for months_ago in range(12):
            years_ago, month_index = divmod(month - 1 - months_ago, 12)
            item = self._newest_of(f"{year + years_ago:04d}-{month_index + 1:02d}")
            if item is not None:
                return {each.key: each.value for each in parse_properties(item["snapshot"].encode())}
        return None

    def _newest_of(self, month):
        found = self._table.query(
            IndexName=INDEX,
            KeyConditionExpression=Key("createdOnMonth").eq(month),
            ScanIndexForward=False,
            Limit=1,
        )
        return found["Items"][0] if found["Items"] else None
