"""The charts as Vega-Lite: the one room that holds them, for the report's page and for wandb's custom charts.

A spec says what is drawn and with which columns; rows come from :mod:`lightning_slt.publish.chart_rows` and
:mod:`lightning_slt.publish.susceptibility_rows`. Three things are left open, and filled in by
:mod:`lightning_slt.publish.specs.filled`:

==================  ===================================================================================================
``${field:name}``   a column; wandb's own notation for a field that the panel's settings choose
``@good`` and such  a colour of the palette, so that one spec serves a light and a dark page
``@width``, ...     a number that only the place knows: the width there is, the limits of an axis
==================  ===================================================================================================
"""
