#!/usr/bin/env python3
#
# memory-backend-private: emulated, and on KVM where the host has
# software-protected VMs
#
# SPDX-License-Identifier: GPL-2.0-or-later

from qemu_test import QemuSystemTest

PAGE = 4096
RAM = 64 << 20


class PrivateMemory(QemuSystemTest):

    def firmware(self):
        """A guest that does nothing: hlt, and a jump to it."""
        image = bytearray(b'\xf4\xeb\xfd'.ljust(65536, b'\xf4'))
        image[-16:-11] = b'\xea\x00\x00\x00\xf0'
        path = self.scratch_file('firmware.bin')
        with open(path, 'wb') as file:
            file.write(image)
        return path

    def start(self, machine, backend=''):
        self.set_machine('q35')
        self.vm.add_args('-nodefaults', '-m', str(RAM >> 20),
                         '-bios', self.firmware(),
                         '-object', 'memory-backend-private,id=ram0,'
                         f'size={RAM}{backend}',
                         '-machine', f'memory-backend=ram0{machine}')
        self.vm.launch()

    def convert(self, address, size, private):
        arguments = {'address': address, 'size': size, 'private': private}
        return self.vm.qmp('x-private-memory-convert', arguments)

    def check_conversions(self, agent):
        self.assertEqual(self.convert(16 << 20, 3 * PAGE, True)['return'], {})
        refused = self.convert(RAM, PAGE, True)
        self.assertIn('cannot be private', refused['error']['desc'])
        info = self.vm.cmd('query-private-memory')[0]
        self.assertEqual(info['agent'], agent)
        self.assertEqual(info['private'], 3 * PAGE)
        self.assertEqual(info['private'] + info['shared'], RAM)
        self.assertEqual(info.get('held-twice', 0), 0)
        said = self.vm.cmd('human-monitor-command',
                           command_line='info private-memory')
        self.assertIn('+', said)
        self.convert(0, RAM, False)
        info = self.vm.cmd('query-private-memory')[0]
        self.assertEqual(info['private'], 0)

    def test_emulated(self):
        self.require_accelerator('tcg')
        self.vm.add_args('-accel', 'tcg')
        self.start('', ',emulate=on')
        self.check_conversions('emulated')

    def test_sw_protected(self):
        self.require_accelerator('kvm')
        self.vm.add_args('-accel', 'kvm', '-cpu', 'host',
                         '-object', 'sw-protected-guest,id=cgs0')
        try:
            self.start(',smm=off,confidential-guest-support=cgs0')
        except Exception:
            log = self.vm.get_log() or ''
            if 'needs KVM VM type' in log:
                self.skipTest("this host's KVM has no software-protected VMs")
            raise
        self.check_conversions('sw-protected')


if __name__ == '__main__':
    QemuSystemTest.main()
