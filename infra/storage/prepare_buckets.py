"""Creates the buckets, sets the rule that removes abandoned uploads, and proves that the store can commit.

    python infra/storage/prepare_buckets.py iqpir mlflow

Address and credentials come from the usual variables (``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``, ...).
Safe to run again. A corpus commits a piece of work by a PUT with ``If-None-Match: *``: on a store that
ignores the header two workers could both believe that they were first, so such a store is refused here.

Exit codes: 0 ready; 1 wrong use or an unreachable store; 4 the store ignores ``If-None-Match``.
"""

import argparse
import logging
import sys
import uuid
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

log = logging.getLogger("prepare_buckets")

PROBE_PREFIX = ".probe/"
EXISTS = frozenset({"BucketAlreadyOwnedByYou", "BucketAlreadyExists"})
REFUSED = frozenset({409, 412})


def create_bucket(client: Any, bucket: str) -> None:
    """Create ``bucket`` unless it is there."""
    region = client.meta.region_name
    # us-east-1 is the one region that must not be named.
    place = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
    try:
        client.create_bucket(Bucket=bucket, **place)
    except ClientError as error:
        if error.response["Error"]["Code"] not in EXISTS:
            raise
    log.info("bucket %s is there", bucket)


def expire_abandoned_uploads(client: Any, bucket: str, days: int) -> bool:
    """Ask the store to abort multipart uploads that nobody finished; False where it has no such rules."""
    rule = {
        "ID": "abort-abandoned-uploads",
        "Status": "Enabled",
        "Filter": {"Prefix": ""},
        "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": days},
    }
    try:
        client.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration={"Rules": [rule]})
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if code not in {"NotImplemented", "MethodNotAllowed", "MalformedXML"}:
            raise
        log.warning("%s: no lifecycle rules here (%s); clear abandoned uploads by hand", bucket, code)
        return False
    log.info("%s: uploads abandoned for %d days are aborted", bucket, days)
    return True


def creates_only_once(client: Any, bucket: str) -> bool:
    """Whether a second PUT with ``If-None-Match: *`` on one key is refused and leaves the first content."""
    key = f"{PROBE_PREFIX}{uuid.uuid4().hex}"
    client.put_object(Bucket=bucket, Key=key, Body=b"first", IfNoneMatch="*")
    try:
        try:
            client.put_object(Bucket=bucket, Key=key, Body=b"second", IfNoneMatch="*")
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] not in REFUSED:
                raise
        return bool(client.get_object(Bucket=bucket, Key=key)["Body"].read() == b"first")
    finally:
        client.delete_object(Bucket=bucket, Key=key)


def prepare(client: Any, buckets: list[str], days: int) -> int:
    """Prepare every bucket and return the exit code."""
    for bucket in buckets:
        create_bucket(client, bucket)
        expire_abandoned_uploads(client, bucket, days)
        if not creates_only_once(client, bucket):
            log.error("%s: the store ignores If-None-Match; a corpus cannot be committed there safely", bucket)
            return 4
        log.info("%s: create-if-absent holds", bucket)
    return 0


def main() -> int:
    """Parse the command line, prepare the buckets, and return the exit code."""
    parser = argparse.ArgumentParser(description="Create buckets and prove that the store can commit.")
    parser.add_argument("buckets", nargs="+", help="names of buckets")
    parser.add_argument("--days", type=int, default=2, help="days after which an unfinished upload is aborted")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    # Quiet below warnings: botocore's debug output holds credentials.
    logging.getLogger("botocore").setLevel(logging.WARNING)
    settings = Config(connect_timeout=5, read_timeout=30, retries={"mode": "standard", "max_attempts": 3})
    try:
        return prepare(boto3.client("s3", config=settings), arguments.buckets, arguments.days)
    except (BotoCoreError, ClientError) as error:
        log.error("the store does not answer as it should: %s", error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
