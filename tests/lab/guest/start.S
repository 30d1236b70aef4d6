/*
 * From the reset vector to C: 16 bit, 32 bit, 64 bit. Every vCPU takes this
 * road, the boot CPU from the reset vector, the other one by a start-up IPI to
 * page 0xf0. All code and the GDT stay in ROM; page tables, stacks and data lie
 * in low RAM, which no test converts.
 */
	.set	PAGES_2M, 16 * 512	/* 16 GiB mapped one to one ... */
	.set	PAGES_1G, 512		/* ... and up to 512 GiB where the CPU has pages of 1 GiB */
#ifdef LOADER
	.set	LOW_PAGES, 160
	.set	LOW_SIDE, 0x10		/* private, pages of 4 KiB */
#else
	.set	LOW_PAGES, 128
	.set	LOW_SIDE, 0		/* shared */
#endif

	.section .text.entry, "ax"
	.code16
	.globl	entry
entry:
	cli
	movw	%cs, %ax
	movw	%ax, %ds
	lgdtl	gdt_pointer - 0xf0000
	movl	%cr0, %eax
	orl	$1, %eax
	movl	%eax, %cr0
	ljmpl	$0x08, $entry32

	.code32
entry32:
	movw	$0x10, %ax
	movw	%ax, %ds
	movw	%ax, %es
	movw	%ax, %ss
	movl	$0x1b, %ecx		/* IA32_APIC_BASE: bit 8 tells the boot CPU */
	rdmsr
	movl	$ap_stack_top, %esp
	testl	$0x100, %eax
	jz	long_mode

#if defined(START_PRIVATE) || defined(LOADER)
	/* Low RAM comes to its side before it is touched. KVM puts VMCALL or VMMCALL
	 * right where it is the other one's, but not in ROM. */
	xorl	%eax, %eax
	cpuid
	cmpl	$0x756e6547, %ebx	/* "Genu" */
	movl	$12, %eax		/* KVM_HC_MAP_GPA_RANGE */
	movl	$0, %ebx
	movl	$LOW_PAGES, %ecx
	movl	$LOW_SIDE, %edx
	je	1f
	vmmcall
	jmp	2f
1:	vmcall
2:
#endif
	movl	$boot_stack_top, %esp
	movl	$__bss_start, %edi
	movl	$__bss_end, %ecx
	subl	%edi, %ecx
	xorl	%eax, %eax
	cld
	rep stosb
	call	build_page_tables

long_mode:
	movl	%cr4, %eax
	orl	$0x20, %eax		/* PAE */
	movl	%eax, %cr4
	movl	$pml4, %eax
	movl	%eax, %cr3
	movl	$0xc0000080, %ecx	/* EFER.LME */
	rdmsr
	orl	$0x100, %eax
	wrmsr
	movl	%cr0, %eax
	orl	$0x80000000, %eax
	movl	%eax, %cr0
	ljmpl	$0x18, $entry64

build_page_tables:
	movl	$pdpt + 3, pml4
	movl	$page_directories + 3, %eax
	xorl	%ecx, %ecx
1:	movl	%eax, pdpt(, %ecx, 8)
	addl	$0x1000, %eax
	incl	%ecx
	cmpl	$PAGES_2M / 512, %ecx
	jb	1b
2:	movl	%ecx, %eax
	shll	$30, %eax
	orl	$0x83, %eax		/* present, writable, 1 GiB */
	movl	%eax, pdpt(, %ecx, 8)
	movl	%ecx, %eax
	shrl	$2, %eax
	movl	%eax, pdpt + 4(, %ecx, 8)
	incl	%ecx
	cmpl	$PAGES_1G, %ecx
	jb	2b
	xorl	%ecx, %ecx
3:	movl	%ecx, %eax
	shll	$21, %eax
	orl	$0x83, %eax		/* present, writable, 2 MiB */
	movl	%eax, page_directories(, %ecx, 8)
	movl	%ecx, %eax
	shrl	$11, %eax
	movl	%eax, page_directories + 4(, %ecx, 8)
	incl	%ecx
	cmpl	$PAGES_2M, %ecx
	jb	3b
	ret

	.code64
entry64:
	movl	%esp, %esp
	cmpq	$boot_stack_top, %rsp
	jne	1f
	call	boot_main
1:	call	ap_main
2:	cli
	hlt
	jmp	2b

/* Exceptions end the guest with a report: trap(vector, frame). */
	.macro	stub vector
	.balign	16
	.if	!((\vector == 8) || (\vector >= 10 && \vector <= 14) || (\vector == 17) || (\vector == 21))
	pushq	$0
	.endif
	pushq	$\vector
	jmp	to_trap
	.endm

	.balign	16
	.globl	trap_stubs
trap_stubs:
	.set	i, 0
	.rept	32
	stub	i
	.set	i, i + 1
	.endr

to_trap:
	popq	%rdi
	movq	%rsp, %rsi
	andq	$-16, %rsp
	call	trap

#ifdef LOADER
/* enter_kernel(entry, start_info): as PVH has it, in 32 bit and without paging. */
	.globl	enter_kernel
enter_kernel:
	pushq	$0x08
	pushq	$leave_long_mode
	lretq
	.code32
leave_long_mode:
	movw	$0x10, %ax
	movw	%ax, %ds
	movw	%ax, %es
	movw	%ax, %ss
	movl	%cr0, %eax
	andl	$0x7fffffff, %eax
	movl	%eax, %cr0
	movl	$0xc0000080, %ecx	/* EFER.LME */
	rdmsr
	andl	$~0x100, %eax
	wrmsr
	xorl	%eax, %eax
	movl	%eax, %cr4
	movl	%esi, %ebx
	jmp	*%edi
	.code64
#else
/* A machine check is looked at, and then the guest goes on where it was. */
	.globl	machine_check_stub
machine_check_stub:			/* five words are on the stack, and no error code */
	.irp	register, rax, rcx, rdx, rsi, rdi, r8, r9, r10, r11
	pushq	%\register
	.endr
	cld
	call	machine_check
	.irp	register, r11, r10, r9, r8, rdi, rsi, rdx, rcx, rax
	popq	%\register
	.endr
	iretq
#endif

	.section .rodata
	.balign	8
gdt:					/* accessed bits set: the CPU must not write to ROM */
	.quad	0
	.quad	0x00cf9b000000ffff	/* 0x08 code, 32 bit */
	.quad	0x00cf93000000ffff	/* 0x10 data */
	.quad	0x00af9b000000ffff	/* 0x18 code, 64 bit */
gdt_end:
gdt_pointer:
	.word	gdt_end - gdt - 1
	.long	gdt

	.section .bss.tables, "aw", @nobits
	.balign	4096
pml4:			.skip	4096
pdpt:			.skip	4096
page_directories:	.skip	PAGES_2M * 8
			.skip	8192
boot_stack_top:
			.skip	8192
ap_stack_top:

	.section .reset, "ax"
	.code16
	ljmpw	$0xf000, $0

	.section .note.GNU-stack, "", @progbits
