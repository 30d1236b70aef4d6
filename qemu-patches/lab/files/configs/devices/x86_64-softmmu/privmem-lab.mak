# SPDX-License-Identifier: GPL-2.0-or-later
#
# The outer machine of libprivmem's lab, and nothing else: fewer files to build.

CONFIG_Q35=y
# For devices that are assigned to an inner machine.
CONFIG_VTD=y
CONFIG_EDU=y
# ACPI's tables of a q35 machine do not link without CXL, nor does that without these.
CONFIG_CXL=y
CONFIG_CXL_MEM_DEVICE=y
CONFIG_PCIE_PORT=y
CONFIG_PXB=y
