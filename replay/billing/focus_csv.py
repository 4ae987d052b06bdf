"""Invoice lines as FOCUS 1.2, the FinOps Foundation's billing format: CSV for finance tools.

An invoice line becomes one row per priced quantity: prompt tokens, cached tokens, output tokens, seconds, or
a correction. Costs are exact decimals and add up to the invoice.
"""

import csv
import io
from collections.abc import Iterator, Mapping

from events.money import usd
from replay.billing.invoice import Invoice, InvoiceLine

Prices = Mapping[tuple[int, str], Mapping[str, int | None]]
"""By version and model: `prompt_nanousd`, `output_nanousd`, `cached_prompt_nanousd`, `second_nanousd`."""

COLUMNS = (
    *("BilledCost", "BillingAccountId", "BillingAccountName", "BillingCurrency", "BillingPeriodStart"),
    *("BillingPeriodEnd", "ChargeCategory", "ChargeClass", "ChargeDescription", "ChargeFrequency"),
    *("ChargePeriodStart", "ChargePeriodEnd", "ConsumedQuantity", "ConsumedUnit", "ContractedCost"),
    *("ContractedUnitPrice", "EffectiveCost", "InvoiceId", "InvoiceIssuerName", "ListCost", "ListUnitPrice"),
    *("PricingCategory", "PricingCurrency", "PricingQuantity", "PricingUnit", "ProviderName"),
    *("PublisherName", "ResourceId", "ServiceCategory", "ServiceName", "ServiceSubcategory", "SkuId"),
    *("SkuPriceId", "x_Positions", "x_Digest"),
)

# The priced quantities: field of the line, field of the price, unit.
PRICED = (
    ("prompt_tokens", "prompt_nanousd", "Tokens"),
    ("cached_tokens", "cached_prompt_nanousd", "Tokens"),
    ("output_tokens", "output_nanousd", "Tokens"),
)


def csv_of(invoice: Invoice, prices: Prices) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for line in invoice.lines:
        for row in _rows(invoice, line, prices):
            writer.writerow(row)
    return text.getvalue()


def _rows(invoice: Invoice, line: InvoiceLine, prices: Prices) -> Iterator[dict[str, str]]:
    if line.plan == "correction":
        yield _row(invoice, line, "correction", line.nanousd) | {
            "ChargeCategory": "Adjustment",
            "ChargeFrequency": "One-Time",
            "PricingCategory": "",
        }
        return
    price = prices[line.price_version, line.model]
    if line.plan == "per_second":
        yield _usage(invoice, line, ("seconds", "second_nanousd", "Seconds"), price)
        return
    for priced in PRICED:
        if getattr(line, priced[0]):
            yield _usage(invoice, line, priced, price)


def _usage(
    invoice: Invoice, line: InvoiceLine, priced: tuple[str, str, str], price: Mapping[str, int | None]
) -> dict[str, str]:
    what, priced_by, unit = priced
    quantity = getattr(line, what)
    unit_nanousd = price[priced_by] or 0
    each = usd(unit_nanousd)
    return _row(invoice, line, what, quantity * unit_nanousd) | {
        "ConsumedQuantity": str(quantity),
        "ConsumedUnit": unit,
        "PricingQuantity": str(quantity),
        "PricingUnit": unit,
        "ListUnitPrice": each,
        "ContractedUnitPrice": each,
        "SkuPriceId": f"{line.model}/{what}/v{line.price_version}",
    }


def _row(invoice: Invoice, line: InvoiceLine, what: str, cost_nanousd: int) -> dict[str, str]:
    first, after = _bounds(invoice.period)
    cost = usd(cost_nanousd)
    described = what.replace("_", " ")
    return {
        **dict.fromkeys(("BilledCost", "EffectiveCost", "ListCost", "ContractedCost"), cost),
        **dict.fromkeys(("BillingAccountId", "BillingAccountName"), invoice.account),
        **dict.fromkeys(("BillingCurrency", "PricingCurrency"), "USD"),
        **dict.fromkeys(("BillingPeriodStart", "ChargePeriodStart"), first),
        **dict.fromkeys(("BillingPeriodEnd", "ChargePeriodEnd"), after),
        **dict.fromkeys(("ProviderName", "PublisherName", "InvoiceIssuerName"), "Rift"),
        "ChargeCategory": "Usage",
        "ChargeDescription": f"{line.model or 'account'}: {described}",
        "ChargeFrequency": "Usage-Based",
        # A provisional invoice does not have a number.
        "InvoiceId": f"{invoice.account}/{invoice.period}" if invoice.status == "closed" else "",
        "PricingCategory": "Standard",
        "ResourceId": line.model,
        "ServiceCategory": "AI and Machine Learning",
        "ServiceSubcategory": "Generative AI",
        "ServiceName": "Inference",
        "SkuId": f"{line.model}/{what}",
        "x_Positions": f"{line.positions['first']}..{line.positions['last']}",
        "x_Digest": line.digest,
    }


def _bounds(period: str) -> tuple[str, str]:
    """Return the first instant of a month and the first one after it."""
    year, month = map(int, period.split("-"))
    return f"{period}-01T00:00:00Z", f"{year + month // 12:04d}-{month % 12 + 1:02d}-01T00:00:00Z"
